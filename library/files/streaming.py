"""Writing a safetensors file tensor by tensor, so that it may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from library.files.atomic import replacing
from library.files.hashing import HashedFile
from library.files.safetensors_header import content, file_order, header
from library.files.weights import SAFETENSORS_SUFFIXES


def stream_safetensors(
    shapes: Mapping[str, Tensor],
    value: Callable[[str], Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a file whose tensors are made one at a time: the file is whole or it is not there.

    `shapes` says which tensors there will be, with the shape and dtype of each, on the meta device; `value` makes
    the one of a name and is called once for each, in the order of the file. The answer is the SHA-256 of the file, made
    while it is written.

    Raises:
        ValueError: `path` does not end in .safetensors.
    """
    target = Path(path)
    if target.suffix.lower() not in SAFETENSORS_SUFFIXES:
        raise ValueError(f"{target}: only a .safetensors file can be written tensor by tensor; give it that ending")
    with replacing(target) as temporary, temporary.open("wb") as file:
        hashed = HashedFile(file)
        hashed.write(header(shapes, metadata or {}))
        for name in file_order(shapes):
            tensor = value(name)
            planned = shapes[name]
            assert tensor.shape == planned.shape and tensor.dtype == planned.dtype, f"{name} is not what was planned"
            hashed.write(content(tensor))
    return hashed.hexdigest()
