"""Hashes of model files that go into metadata."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LEGACY_OFFSET = 0x100000
LEGACY_LENGTH = 0x10000
"""The legacy hash looks at 64 KiB, 1 MiB into the file."""

PIECE = 1 << 22

# The order in which safetensors lays tensors out: wide types first, so that each is aligned; then by name.
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileHashes:
    """What identifies a model file; both are a word in capitals when there is no file."""

    legacy: str
    """8 hex digits of SHA-256 over 64 KiB at 1 MiB."""
    sha256: str
    """64 hex digits over the whole file."""


def model_hash(path: str | os.PathLike[str]) -> str:
    """The legacy hash of a file, 8 hex digits; "NOFILE" without a file, "IsADirectory" for a folder."""
    if (absent := _absent(path)) is not None:
        return absent
    with Path(path).open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, 64 hex digits, read piece by piece; the same words as `model_hash` without a file."""
    if (absent := _absent(path)) is not None:
        return absent
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


class BackgroundHash:
    """Both hashes of one file, computed in a thread beside the training that goes on.

    A large file takes longer than the first steps; only the first save needs the answer. Ending the program does
    not wait for it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._hashes: FileHashes | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"hash of {self.path.name}", daemon=True)
        self._thread.start()

    def result(self) -> FileHashes:
        """The hashes, waiting for them; raises OSError if the file could not be read."""
        self._thread.join()
        if self._error is not None:
            raise OSError(f"{self.path} could not be read: {self._error}") from self._error
        assert self._hashes is not None
        return self._hashes

    def _run(self) -> None:
        try:
            self._hashes = FileHashes(model_hash(self.path), sha256_of(self.path))
        except OSError as error:
            self._error = error


def precalculate_safetensors_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` (64 hex) and `sshs_legacy_hash` (8 hex) of a network file that is yet to be written.

    Both are over the file as it would be with nothing but the `ss_` entries of `metadata`, so they stay the same
    when titles are edited. `tensors` are hashed one at a time, in the order and the type they are written in.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    position = _header_length(tensors, kept)
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    for piece in _contents(tensors):
        whole.update(piece)
        start, end = LEGACY_OFFSET - position, LEGACY_OFFSET + LEGACY_LENGTH - position
        if end > 0 and start < len(piece):
            legacy.update(piece[max(0, start) : end])
        position += len(piece)
    # Where the header itself reaches 1 MiB it would be part of the legacy hash; no network has so many names.
    return whole.hexdigest(), legacy.hexdigest()[:8]


def _absent(path: str | os.PathLike[str]) -> str | None:
    if Path(path).is_dir():
        return "IsADirectory"
    return None if Path(path).exists() else "NOFILE"


def _layout(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order their values lie in the file."""
    order = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
    return sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))


def _header_length(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes before the first value: 8 of length, then JSON padded to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}  # written even when it is empty
    offset = 0
    for name in _layout(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return struct.calcsize("<Q") + -(-len(text) // 8) * 8


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of every tensor in file order; at most one tensor is copied at a time."""
    for name in _layout(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
