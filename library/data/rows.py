"""What one image gives to its batch: picture or latents, caption or encoded caption, mask, second image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from library.data.augment import colour_augmented, face_crop, face_of
from library.data.buckets import crop_condition
from library.data.cache_files import read_latents
from library.data.captions import is_dropped, render_caption
from library.data.config import SubsetSettings
from library.data.image_set import ImageSet
from library.data.items import BatchRequest, CachedLatents, ImageItem, Sizes
from library.data.levels import SHARE
from library.data.pixels import crop, load_rgb, load_rgba, make_picture, resize, to_levels
from library.data.text_cache_files import TextCache, stack_text
from library.data.text_variants import variant_caption


@dataclass
class Row:
    """One image of a batch."""

    caption: str
    crop_ltrb: tuple[float, ...]
    flipped: bool
    picture: np.ndarray | None = None
    """[H, W, 3] uint8"""
    latents: Tensor | None = None
    text: dict[str, Tensor] | None = None
    mask: np.ndarray | None = None
    """[H, W] uint8, or float32 in 0..1 from a cache"""
    conditioning: np.ndarray | None = None
    """[H, W, 3] uint8"""


def make_row(item: ImageItem, dataset: ImageSet, random: Random, request: BatchRequest) -> Row:
    """What `item` gives this time; draws in the order: flip, crop, colour, caption.

    A ValueError names the image that cannot be read.
    """
    subset = dataset.settings.subsets[item.subset]
    row = Row("", crop_condition(item.size, item.bucket), subset.flip_aug and random.random() < 0.5)
    cached = _cached(item, dataset, subset)
    if cached is None:
        _add_picture(row, item, subset, random)
    else:
        _add_latents(row, item, subset, cached)
    if item.conditioning_path is not None:
        _add_conditioning(row, item.conditioning_path, item, subset, dataset.settings.masked_loss)
    if dataset.text_cache is not None:
        row.caption, row.text = _cached_text(item, subset, dataset.text_cache, random, request.epoch)
        return row
    row.caption = render_caption(
        item.caption,
        subset.captions,
        random,
        epoch=request.epoch,
        step=request.step,
        total_steps=request.total_steps,
    )
    return row


def pixels_of(rows: Sequence[Row]) -> Tensor | None:
    """[B, 3, H, W] uint8; None when latents are cached."""
    pictures = [row.picture for row in rows if row.picture is not None]
    return to_levels(pictures) if pictures else None


def latents_of(rows: Sequence[Row]) -> Tensor | None:
    """[B, C, h, w]; None when they are not cached."""
    latents = [row.latents for row in rows if row.latents is not None]
    return torch.stack(latents) if latents else None


def text_of(rows: Sequence[Row], cache: TextCache | None) -> dict[str, Tensor]:
    """Cached encodings of the captions, [B, ...] each; none when they are not cached."""
    found = [row.text for row in rows if row.text is not None]
    return stack_text(found, cache.fmt) if cache is not None else {}


def text_lengths_of(rows: Sequence[Row], cache: TextCache | None) -> tuple[int, ...] | None:
    """[B] tokens that count in the cached encodings; None where the format has no mask."""
    if cache is None or not cache.fmt.mask:
        return None
    return tuple(int(row.text[cache.fmt.mask].sum()) for row in rows if row.text is not None)


def masks_of(rows: Sequence[Row], size: tuple[int, int]) -> Tensor | None:
    """[B, 1, H, W] for pictures of `size`, rows without a mask count in full; None when no row has one.

    uint8, or float32 in [0, 1] when one of them is a float.
    """
    if all(row.mask is None for row in rows):
        return None
    full = np.full((size[1], size[0]), 255, dtype=np.uint8)
    masks = [torch.from_numpy(np.ascontiguousarray(full if row.mask is None else row.mask)) for row in rows]
    if any(mask.is_floating_point() for mask in masks):
        masks = [SHARE.numbers(mask) for mask in masks]
    return torch.stack(masks)[:, None]


def conditioning_of(rows: Sequence[Row]) -> Tensor | None:
    """[B, 3, H, W] uint8 of the second images; None when there are none."""
    pictures = [row.conditioning for row in rows if row.conditioning is not None]
    return to_levels(pictures) if pictures else None


def sizes_of(items: Sequence[ImageItem], rows: Sequence[Row]) -> Sizes:
    """Size conditions; the left edge of a mirrored image is what was its right edge."""
    corners = []
    for item, row in zip(items, rows, strict=True):
        left, top, right, _ = row.crop_ltrb
        corners.append((int(top), int(item.bucket[0] - right if row.flipped else left)))
    return Sizes(
        original=torch.tensor([item.size[::-1] for item in items]),
        crop_top_left=torch.tensor(corners),
        target=torch.tensor([item.bucket[::-1] for item in items]),
    )


def _cached(item: ImageItem, dataset: ImageSet, subset: SubsetSettings) -> CachedLatents | None:
    if item.latents is not None or item.latents_file is None:
        return item.latents
    assert dataset.latent_format is not None
    return read_latents(
        item.latents_file, dataset.latent_format, item, flipped=subset.flip_aug, alpha_mask=subset.alpha_mask
    )


def _add_latents(row: Row, item: ImageItem, subset: SubsetSettings, cached: CachedLatents) -> None:
    latents = cached.flipped if row.flipped else cached.latents
    assert latents is not None, f"{item.path} was cached without its mirror image"
    row.latents = torch.as_tensor(latents).float()  # the same from memory and from disk, whatever the cache holds
    row.crop_ltrb = cached.crop_ltrb
    if subset.alpha_mask:  # a mask in the cache that nobody asks for is left alone
        assert cached.alpha_mask is not None, f"{item.path} was cached without its mask"
        row.mask = _mirrored(cached.alpha_mask, row.flipped)


def _add_picture(row: Row, item: ImageItem, subset: SubsetSettings, random: Random) -> None:
    try:
        picture = _drawn_picture(item, subset, random)
    except ValueError as error:
        raise ValueError(f"{item.path} cannot be read: {error}; repair or remove it") from error
    picture = _mirrored(picture, row.flipped)
    row.picture = picture[:, :, :3]
    if subset.alpha_mask:
        row.mask = picture[:, :, 3]


def _drawn_picture(item: ImageItem, subset: SubsetSettings, random: Random) -> np.ndarray:
    """[H, W, 3] uint8, or [H, W, 4] with the mask, cropped and coloured as drawn."""
    image = load_rgba(item.path) if subset.alpha_mask else load_rgb(item.path)
    face = None if subset.face_crop_aug_range is None else face_of(item.path)
    if subset.face_crop_aug_range is not None and face is not None:
        zoom, interpolation = subset.face_crop_aug_range, subset.resize_interpolation
        image = face_crop(image, face, zoom, item.bucket, subset.random_crop, random, interpolation)
    else:
        place = random if subset.random_crop else None
        image = crop(resize(image, item.resized, subset.resize_interpolation), item.bucket, place)
    return colour_augmented(image, random) if subset.color_aug else image


def _add_conditioning(row: Row, path: Path, item: ImageItem, subset: SubsetSettings, is_mask: bool) -> None:
    """The second image, scaled, cropped and mirrored as the first; the red channel of a mask is what counts."""
    try:
        picture = make_picture(path, item.resized, item.bucket, subset.resize_interpolation)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; repair or replace it") from error
    picture = _mirrored(picture, row.flipped)
    if is_mask:
        row.mask = picture[:, :, 0]
    else:
        row.conditioning = picture


def _mirrored(image: np.ndarray, flipped: bool) -> np.ndarray:
    return image[:, ::-1] if flipped else image


def _cached_text(
    item: ImageItem, subset: SubsetSettings, cache: TextCache, random: Random, epoch: int
) -> tuple[str, dict[str, Tensor]]:
    """The caption used this time and its encoding: the empty one when it is dropped, else one of the variants."""
    if is_dropped(subset.captions, random, epoch):
        return "", cache.text(item, None)
    variant = random.randrange(item.text_variants)
    return variant_caption(item, subset.captions, variant), cache.text(item, variant)
