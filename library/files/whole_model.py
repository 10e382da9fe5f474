"""A whole model on its way to the disk: what each tensor will be, made and written one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from library.files.atomic import replacing
from library.files.hashing import HashedFile
from library.files.sources import Source
from library.files.streaming import stream_safetensors
from library.files.weights import PICKLE_SUFFIXES, describe_keys, open_weights

STATE_DICT = "state_dict"
"""Under which a .ckpt file of this family of programs keeps its tensors."""


@dataclass(frozen=True)
class Value:
    """One tensor of a file to come; `read` makes it when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Value:
        """One that is there already."""
        return Value(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def stored(source: Source) -> Value:
        """One that lies in another file, as it lies there."""
        return Value(source.file.dtype(source.key), source.shape, source.read)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def planned(self) -> Tensor:
        """A tensor without content of the same shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def joined(parts: list[Value], shape: tuple[int, ...], dtype: torch.dtype | None) -> Value:
    """`parts` one after the other along the first dimension, in `shape`; those with a fraction are cast to `dtype`."""
    own = parts[0].dtype
    target = dtype if dtype is not None and own.is_floating_point else own

    def read() -> Tensor:
        tensors = [part.read().to(target) for part in parts]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(shape)

    return Value(target, shape, read)


def write_tensors(
    values: Mapping[str, Value],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Write `values` to `path`, whole or not at all; the answer is the SHA-256 of the file, made on the way.

    A .safetensors file holds `metadata` and is written tensor by tensor. A .ckpt file nests its tensors under
    `state_dict`, with what is given as `beside` next to it; a .bin file is nothing but the tensors. Of these two the
    format wants all values at once.
    """
    target = Path(path)
    if target.suffix.lower() not in PICKLE_SUFFIXES:
        planned = {name: value.planned() for name, value in values.items()}
        return stream_safetensors(planned, lambda name: values[name].read(), target, metadata)
    tensors = {name: value.read().contiguous() for name, value in values.items()}
    content: dict[str, Any] = tensors if beside is None else {STATE_DICT: tensors, **beside}
    with replacing(target) as temporary, temporary.open("wb") as file:
        hashed = HashedFile(file)
        torch.save(content, cast(Any, hashed))
        return hashed.hexdigest()


def check_written(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Reopen `path`; ValueError unless exactly the `expected` tensors are in it, in their shapes."""
    with open_weights(path) as file:
        found = {key: file.shape(key) for key in file.keys()}
    wrong = {
        "missing": [key for key in expected if key not in found],
        "not of this model": [key for key in found if key not in expected],
        "of another shape": [key for key in found if key in expected and found[key] != expected[key]],
    }
    faults = [f"{len(keys)} keys {what}: {describe_keys(keys)}" for what, keys in wrong.items() if keys]
    if faults:
        raise ValueError(f"{path} is not what other programs expect: {'; '.join(faults)}")
