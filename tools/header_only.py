"""What does a checkpoint of full size look like from outside? Its header, before a hole where the weights would be."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

FACTS = Path(__file__).resolve().parents[1] / "tests" / "facts" / "checkpoints"
FORMATS = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}


def header(facts: str, dtype: str) -> tuple[bytes, int]:
    """The start of a .safetensors file with every tensor of a published one in `dtype`, and the bytes that follow."""
    return _header(_published(facts), dtype)


def published_shapes(facts: str) -> dict[str, tuple[int, ...]]:
    """Every key of a published file, and the shape of its tensor."""
    return {key: tuple(shape) for key, (shape, _) in _published(facts).items()}


def write_hollow_checkpoint(path: Path, facts: str, dtype: str = "float16") -> None:
    """A file with the header and the length of a published one; most file systems store no byte of the rest."""
    _write_hole(path, *header(facts, dtype))


def write_hollow_file(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "float16") -> None:
    """The same with tensors of `shapes`."""
    _write_hole(path, *_header({key: (shape, dtype) for key, shape in shapes.items()}, dtype))


def write_random_bytes(path: Path, start: bytes, size: int) -> None:
    """`start` and `size` bytes more, the same random ones again and again."""
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        file.write(start)
        for done in range(0, size, len(block)):
            file.write(block[: size - done])
        file.flush()
        os.fsync(file.fileno())  # so that writing back does not run beside the measurement


def _published(facts: str) -> dict[str, tuple[Sequence[int], str]]:
    """Every key of a published file, the shape and the dtype of its tensor."""
    keys: dict[str, tuple[Sequence[int], str]]
    keys = json.loads((FACTS / f"{facts}.json").read_text(encoding="utf-8"))["keys"]
    return keys


def _header(tensors: Mapping[str, tuple[Sequence[int], str]], dtype: str) -> tuple[bytes, int]:
    name, width = FORMATS[dtype]
    entries, end = {}, 0
    for key, (shape, stored) in tensors.items():
        tag, bytes_each = ("I64", 8) if stored == "int64" else (name, width)
        start, end = end, end + math.prod(shape) * bytes_each
        entries[key] = {"dtype": tag, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, end


def _write_hole(path: Path, start: bytes, rest: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + rest)
