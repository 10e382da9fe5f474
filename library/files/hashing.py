"""Hashes of model files that go into metadata."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from library.files.safetensors_header import content, file_order, header

LEGACY_OFFSET = 0x100000
LEGACY_LENGTH = 0x10000
"""The legacy hash looks at 64 KiB, 1 MiB into the file."""

PIECE = 1 << 22


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


class HashedFile:
    """A file that is written from its beginning to its end, and its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append `data`."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """As a file does it."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Of all that was written, 64 hexadecimal digits."""
        return self._digest.hexdigest()


def precalculate_safetensors_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` (64 hex) and `sshs_legacy_hash` (8 hex) of a network file that is yet to be written.

    Both are over the file as it would be with nothing but the `ss_` entries of `metadata`, so they stay the same
    when titles are edited. `tensors` are hashed one at a time, in the order and the type they are written in.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    position = len(header(tensors, kept))
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    for piece in (content(tensors[name]) for name in file_order(tensors)):
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
