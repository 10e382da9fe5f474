"""What does a checkpoint of full size look like from outside? Its header, before a hole where the weights would be."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

FACTS = Path(__file__).resolve().parents[1] / "tests" / "facts" / "checkpoints"
FORMATS = {"float16": ("F16", 2), "float32": ("F32", 4)}


def header(facts: str, dtype: str) -> tuple[bytes, int]:
    """The start of a .safetensors file with every tensor of a published one in `dtype`, and the bytes that follow."""
    name, width = FORMATS[dtype]
    keys = json.loads((FACTS / f"{facts}.json").read_text(encoding="utf-8"))["keys"]
    entries, end = {}, 0
    for key, (shape, stored) in keys.items():
        tag, bytes_each = ("I64", 8) if stored == "int64" else (name, width)
        start, end = end, end + math.prod(shape) * bytes_each
        entries[key] = {"dtype": tag, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, end


def write_hollow_checkpoint(path: Path, facts: str, dtype: str = "float16") -> None:
    """A file with the header and the length of a published one; most file systems store no byte of the rest."""
    start, rest = header(facts, dtype)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + rest)


def write_random_bytes(path: Path, start: bytes, size: int) -> None:
    """`start` and `size` bytes more, the same random ones again and again."""
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        file.write(start)
        for done in range(0, size, len(block)):
            file.write(block[: size - done])
        file.flush()
        os.fsync(file.fileno())  # so that writing back does not run beside the measurement
