"""How tensors stand in the .npz files of the caches: in which numbers, and how a file is replaced."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.files.atomic import replacing

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What NumPy raises on files that are not, or not wholly, an .npz."""

MARK = "fingerprint"
"""Name of the array that says what the others were made from."""

NUMBERS = "dtype"
"""Name of the array that says `bfloat16` where the others hold its 16 bits as uint16, for other programs: NumPy
knows no bf16. No cache has other arrays of uint16, so that here the type of the array is enough."""

CACHE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""--cache_dtype -> the type of the stored numbers."""


def to_array(values: Tensor) -> np.ndarray:
    """`values` as NumPy holds them; bf16 becomes its bits in uint16."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """The tensor that `to_array` was given."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def fine_enough(stored: str, wanted: torch.dtype | None) -> bool:
    """Whether numbers of type `stored` will do where `wanted` is asked for; None asks for nothing."""
    return wanted is None or stored in ("float32", name_of(wanted))


def rewrite(path: Path, arrays: Mapping[str, np.ndarray], keeps: Callable[[str], bool]) -> None:
    """Put `arrays` into the file, beside those of its old arrays that `keeps` names."""
    kept: dict[str, np.ndarray] = {}
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as old:
                kept = {name: old[name] for name in old.files if keeps(name)}
        except UNREADABLE:
            kept = {}
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **(kept | dict(arrays)))
