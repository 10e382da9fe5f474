"""How the latents of an image lie on disk: file name, arrays, and the fingerprint that tells a stale file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import crop_condition
from library.data.cache_arrays import MARK, NUMBERS, UNREADABLE, fine_enough, name_of, rewrite, to_array, to_tensor
from library.data.items import CachedLatents, ImageItem
from library.files.formats import LatentFormat

VERSION = 1
"""Counts up when the same image, settings and VAE give other latents."""


@dataclass(frozen=True)
class ImageState:
    """The bytes of an image file, and when they were looked at."""

    digest: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Recipe:
    """What decides the latents of an image, besides its bytes."""

    bucket: tuple[int, int]
    resized: tuple[int, int]
    interpolation: str | None
    vae_id: str
    alpha: bool = False
    """Whether the alpha channel is scaled with the colours, which it then changes, and kept as a mask."""

    def fingerprint(self, digest: str) -> str:
        """A name for the latents that this recipe makes of the image whose bytes have `digest`."""
        parts: tuple[Any, ...] = (VERSION, digest, self.bucket, self.resized, "centre", self.interpolation, self.vae_id)
        parts += ("alpha",) if self.alpha else ()
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Verdict(Enum):
    """What a cache file is worth."""

    GOOD = "good"
    TOUCHED = "the image file is newer but its bytes are the same"
    UNMARKED = "fits, but does not say what it was made from"
    STALE = "missing, unreadable or made from something else"


def latents_path(item: ImageItem, fmt: LatentFormat) -> Path:
    """`<image without extension>_<W>x<H><suffix>`, with the size of the source image."""
    width, height = item.size
    return item.path.with_name(f"{item.path.stem}_{width:04d}x{height:04d}{fmt.suffix}")


def array_suffix(item: ImageItem, fmt: LatentFormat) -> str:
    """What the names of the item's arrays end in."""
    return f"_{item.bucket[1] // fmt.stride}x{item.bucket[0] // fmt.stride}" if fmt.sizes_in_keys else ""


def file_in_use(file: Path, item: ImageItem, fmt: LatentFormat) -> Path:
    """`file`, or the `<stem>.npz` of an older version that stands in for it."""
    if fmt.reads_stem_files and file == latents_path(item, fmt) and not file.exists():
        legacy = item.path.with_suffix(".npz")
        if legacy.exists():
            return legacy
    return file


def image_state(path: Path, content: bytes | None = None) -> ImageState:
    """The state of an image file; `content` spares reading it again."""
    stat = path.stat()
    digest = hashlib.blake2b(path.read_bytes() if content is None else content, digest_size=16).hexdigest()
    return ImageState(digest, stat.st_size, stat.st_mtime_ns)


def check_latents(
    file: Path, item: ImageItem, fmt: LatentFormat, recipe: Recipe, flipped: bool, dtype: torch.dtype | None = None
) -> Verdict:
    """What the cache `file` of `item` is worth; the image is read only if its size or time has changed.

    Numbers coarser than `dtype` are worth nothing; None takes any.
    """
    path, end = file_in_use(file, item, fmt), array_suffix(item, fmt)
    if not path.exists():
        return Verdict.STALE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            if f"latents{end}" not in names or (flipped and f"latents_flipped{end}" not in names):
                return Verdict.STALE
            if recipe.alpha and f"alpha_mask{end}" not in names:
                return Verdict.STALE
            if MARK + end not in names:
                return Verdict.UNMARKED if arrays[f"latents{end}"].shape == _shape(item, fmt) else Verdict.STALE
            fingerprint, digest, size, mtime_ns, numbers = _words(arrays[MARK + end])
    except UNREADABLE:
        return Verdict.STALE
    if not fine_enough(numbers, dtype):
        return Verdict.STALE
    stat = item.path.stat()
    if (str(stat.st_size), str(stat.st_mtime_ns)) == (size, mtime_ns):
        return Verdict.GOOD if fingerprint == recipe.fingerprint(digest) else Verdict.STALE
    same = fingerprint == recipe.fingerprint(image_state(item.path).digest)
    return Verdict.TOUCHED if same else Verdict.STALE


def mark_latents(file: Path, item: ImageItem, fmt: LatentFormat, recipe: Recipe) -> None:
    """Write into the cache file in use that it was made from the image as it is now."""
    path, end = file_in_use(file, item, fmt), array_suffix(item, fmt)
    with np.load(path, allow_pickle=False) as arrays:
        numbers = name_of(to_tensor(arrays[f"latents{end}"]).dtype)
    mark = _mark(image_state(item.path), recipe, numbers)
    rewrite(path, {MARK + end: mark}, keeps=lambda name: name != MARK + end)


def write_latents(
    file: Path,
    item: ImageItem,
    fmt: LatentFormat,
    recipe: Recipe,
    state: ImageState,
    latents: Tensor,
    flipped: Tensor | None = None,
    alpha_mask: np.ndarray | None = None,
) -> None:
    """Write latents [C, h, w] of `item`, and its mask [H, W]; arrays of other sizes stay in a file with several."""
    end, numbers = array_suffix(item, fmt), name_of(latents.dtype)
    arrays = {
        f"latents{end}": to_array(latents),
        f"original_size{end}": np.array(item.size),
        f"crop_ltrb{end}": np.array(crop_condition(item.size, item.bucket), dtype=np.float64),
        MARK + end: _mark(state, recipe, numbers),
    }
    if flipped is not None:
        arrays[f"latents_flipped{end}"] = to_array(flipped)
    if alpha_mask is not None:
        arrays[f"alpha_mask{end}"] = alpha_mask
    if numbers == "bfloat16":
        arrays[NUMBERS + end] = np.array(numbers)
    rewrite(file, arrays, keeps=lambda name: fmt.sizes_in_keys and not name.endswith(end))


def read_latents(
    file: Path, fmt: LatentFormat, item: ImageItem, flipped: bool, alpha_mask: bool = False
) -> CachedLatents:
    """The cached latents of `item`, with those of its mirror image when `flipped` and its mask when `alpha_mask`.

    A ValueError names a broken file.
    """
    path, end = file_in_use(file, item, fmt), array_suffix(item, fmt)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            latents = to_tensor(arrays[f"latents{end}"]).float()
            mirrored = to_tensor(arrays[f"latents_flipped{end}"]).float() if flipped else None
            mask = arrays[f"alpha_mask{end}"].astype(np.float32) if alpha_mask else None
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a usable latent cache ({error}); delete it and start again") from error
    if latents.shape != _shape(item, fmt):
        raise ValueError(
            f"{path}: latents of shape {tuple(latents.shape)}, expected {_shape(item, fmt)}; delete the file"
        )
    if mask is not None and mask.shape != item.bucket[::-1]:
        raise ValueError(f"{path}: a mask of shape {mask.shape}, expected {item.bucket[::-1]}; delete the file")
    return CachedLatents(latents, item.size, crop_condition(item.size, item.bucket), mirrored, mask)


def _shape(item: ImageItem, fmt: LatentFormat) -> tuple[int, int, int]:
    return fmt.channels, item.bucket[1] // fmt.stride, item.bucket[0] // fmt.stride


def _mark(state: ImageState, recipe: Recipe, numbers: str) -> np.ndarray:
    """Five words: the recipe's fingerprint, then digest, size and modification time (ns) of the image, so that an
    image nobody touched is not read again, then the type of the numbers.
    """
    return np.array(f"{recipe.fingerprint(state.digest)} {state.digest} {state.size} {state.mtime_ns} {numbers}")


def _words(mark: np.ndarray) -> tuple[str, str, str, str, str]:
    fingerprint, digest, size, mtime_ns, *numbers = str(mark).split()
    return fingerprint, digest, size, mtime_ns, numbers[0] if numbers else "float32"
