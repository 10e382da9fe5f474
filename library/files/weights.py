"""Reading and writing weight files, one tensor at a time.

`.safetensors` files are read by seeking and reading straight into a fresh tensor. Mapping them into memory would count
every page that was touched as used, so that loading peaks at twice the size of the model.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from library.files.atomic import replacing

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES)
CURE = "copy or download it again"
"""What to do about a file that is not whole."""


class WeightFile(ABC):
    """A file of named tensors, open for reading; a context manager."""

    path: Path
    metadata: dict[str, str]

    @abstractmethod
    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """The dtype of one tensor as stored, without reading it."""

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, as stored, sharing no memory with the file."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_weights(path: str | os.PathLike[str]) -> WeightFile:
    """Open a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file.

    Pickled files are read without running the code in them, and a nested `state_dict` is unwrapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, cut short, not a file of weights, or holds code.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; a file of weights ({', '.join(WEIGHT_SUFFIXES)}) is needed here")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return _PickleFile(file)
    return _SafetensorsFile(file)


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path` in one piece: the file is whole or it is not there."""
    with replacing(path) as temporary:
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, temporary, dict(metadata) if metadata else None)


def describe_keys(keys: Iterable[str], limit: int = 5) -> str:
    """The first few of `keys`, for a message."""
    names = sorted(keys)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

# The longest header that the format allows.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class _SafetensorsFile(WeightFile):
    """A safetensors file: the length of the header, the header as JSON, then the bytes of the tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            self.metadata, self._entries = _read_header(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def read(self, key: str) -> Tensor:
        entry = self._entries[key]
        return _read_bytes(self._file, self.path, key, entry.start, entry.size).view(entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        self._file.close()


def _read_bytes(file: BinaryIO, path: Path, key: str, start: int, size: int) -> Tensor:
    """`size` bytes of `file` as a fresh uint8 tensor."""
    buffer = torch.empty(size, dtype=torch.uint8)
    view = buffer.numpy().data
    file.seek(start)
    done = 0
    # One call reads at most 2 GiB on Linux.
    while done < size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{path} is cut short: it ends inside {key}; {CURE}")
        done += count
    return buffer


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, _Entry]]:
    total = path.stat().st_size
    start = file.read(8)
    if not start:
        raise ValueError(f"{path} is empty; {CURE}")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= _LARGEST_HEADER or start[:7] == b"version":
        raise ValueError(_not_safetensors(path, start))
    if 8 + length > total:
        raise ValueError(f"{path} is cut short: its header alone needs {8 + length} bytes and it has {total}; {CURE}")
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = {key: _entry(value, 8 + length) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
    needed = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if needed > total:
        raise ValueError(f"{path} is cut short: its tensors need {needed} bytes and it has {total}; {CURE}")
    return metadata, entries


def _entry(value: Mapping[str, Any], base: int) -> _Entry:
    dtype = _SAFETENSORS_DTYPES[value["dtype"]]
    shape = tuple(value["shape"])
    begin, end = value["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {value['dtype']} does not fit into {end - begin} bytes")
    return _Entry(dtype, shape, base + begin, end - begin)


def _not_safetensors(path: Path, start: bytes) -> str:
    if start.startswith(b"version"):
        return f"{path} is a Git LFS pointer, not the weights; fetch it with `git lfs pull`"
    if start.startswith(b"PK") or start.startswith(b"\x80"):
        return f"{path} is a pickled file with the wrong extension; rename it to .ckpt"
    if start.lstrip().startswith((b"<", b"{")):
        return f"{path} is a page of text that came in place of the file (was a login needed?); {CURE}"
    return f"{path} is not a safetensors file, or is cut short; {CURE}"


class _PickleFile(WeightFile):
    """A file written by torch.save; of one in its zip format only the table of contents is read at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            place = "meta" if zipfile.is_zipfile(path) else "cpu"
            self._tensors = _flatten(path, _unpickle(path, place))
            if any(tensor.is_meta and _offset(tensor) is None for tensor in self._tensors.values()):
                # Releases of torch before 2.7 do not tell where in the file a tensor lies.
                self._tensors = _flatten(path, _unpickle(path, "cpu"))
        except BaseException:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        tensor = self._tensors[key].detach()
        start = _offset(tensor) if tensor.is_meta else None
        if start is None:
            return tensor
        # Everything from the tensor's first element to its last, which a transposed one does not fill in order.
        extent = (
            sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
        )
        start += int(tensor.storage_offset()) * tensor.itemsize
        flat = _read_bytes(self._file, self.path, key, start, extent * tensor.itemsize).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride()).contiguous()

    def close(self) -> None:
        self._tensors = {}
        self._file.close()


def _offset(tensor: Tensor) -> int | None:
    """Where in the file the storage of an unread tensor begins."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _unpickle(path: Path, place: str) -> object:
    try:
        return torch.load(path, map_location=place, weights_only=True)
    except pickle.UnpicklingError as error:
        if not re.search("unsupported global|trying to call|can only build", str(error), re.IGNORECASE):
            raise ValueError(f"{path} is not a file of weights, or is cut short; {CURE}") from error
        raise ValueError(
            f"{path} holds pickled code besides weights, which could do anything and is not run. If you trust it, "
            "load it with torch.load(..., weights_only=False) in an environment of its own, save its state_dict with "
            "safetensors.torch.save_file, and give the .safetensors file here"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a file of weights, or is cut short; {CURE}") from error


def _flatten(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors of an unpickled checkpoint, at the top or under `state_dict`."""
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(f"{path} holds no named tensors")
    return tensors
