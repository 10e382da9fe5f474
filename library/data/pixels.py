"""What an image file looks like as a training picture: read, turn upright, scale, crop."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from random import Random
from typing import BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from library.data.buckets import centre_crop

Size = tuple[int, int]
"""Width and height in pixels."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises on files that are not, or not wholly, an image."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

EXIF_ORIENTATION = 0x0112

OPENCV = {
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

TAIL = 4096
"""Bytes at the end of a file in which its closing mark is looked for."""


def image_size(path: Path) -> Size:
    """Width and height of the upright image, from the header; ValueError says what is wrong with the file.

    A file that seems to end early is decoded, to be sure.
    """
    try:
        with path.open("rb") as file:
            image = _open(file)
            width, height = image.size
            turned = _orientation(image) >= 5
            if not _ends_properly(file, image.format):
                image.load()
    except BROKEN as error:
        raise ValueError(_reason(error)) from error
    return (height, width) if turned else (width, height)


def load_rgb(source: Path | bytes) -> np.ndarray:
    """[H, W, 3] uint8 of the upright image, alpha dropped; ValueError says what is wrong with the file.

    `source` is a path, or the file's bytes. Sixteen-bit grey becomes eight; of an animation the first frame is read.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            image = _open(file)
            turn = UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            return np.asarray(_as_rgb(upright))
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def glance(content: bytes, size: Size) -> tuple[str, np.ndarray]:
    """The format that a file's bytes are in, and [H, W, 3] uint8 of the upright image squeezed to `size`.

    All of the image is decoded, photographs at a fraction of their size; ValueError says what is wrong with it.
    """
    try:
        image = _open(io.BytesIO(content))
        kind, turn = image.format or "", UPRIGHT.get(_orientation(image))
        image.draft(None, (4 * max(size), 4 * max(size)))
        upright = image if turn is None else image.transpose(turn)
        return kind, np.asarray(_as_rgb(upright).resize(size, Image.Resampling.BOX))
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def make_picture(
    source: Path | bytes, resized: Size, bucket: Size, interpolation: str | None = None, random: Random | None = None
) -> np.ndarray:
    """[H, W, 3] uint8 of size `bucket`: read, scaled to `resized`, cropped in the middle or by `random`."""
    return crop(resize(load_rgb(source), resized, interpolation), bucket, random)


def resize(image: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """`image` [H, W, C] uint8 scaled to `size`; by default area when neither side grows, else lanczos."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation == "nearest":
        return image[_nearest(height, size[1])][:, _nearest(width, size[0])]
    if interpolation in PILLOW:
        return np.asarray(Image.fromarray(image).resize(size, PILLOW[interpolation]))
    return cv2.resize(image, size, interpolation=OPENCV[interpolation])


def _nearest(source: int, target: int) -> np.ndarray:
    """The source row of each target row, in 16-bit fixed point as OpenCV 4 rounds; OpenCV 5 breaks ties otherwise."""
    step = ((source << 16) + target // 2) // target
    rows = (np.arange(target) * step + step // 2 - source % 2) >> 16
    return rows.clip(0, source - 1)


def crop(image: np.ndarray, size: Size, random: Random | None = None) -> np.ndarray:
    """The middle of `image` [H, W, C], or a random place: one draw for each side that is too long, width first."""
    height, width = image.shape[:2]
    left, top = centre_crop((width, height), size)
    if random is not None:
        left = random.randint(0, width - size[0]) if width > size[0] else 0
        top = random.randint(0, height - size[1]) if height > size[1] else 0
    return image[top : top + size[1], left : left + size[0]]


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 of one size -> [B, 3, H, W] float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    pixels = torch.empty(stacked.shape, dtype=torch.float32)
    pixels.copy_(stacked)
    return pixels.div_(255).sub_(0.5).div_(0.5)


def _open(file: BinaryIO | io.BytesIO) -> Image.Image:
    """The image by its content, whatever the file is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images and odd EXIF blocks are no news to the user
        return Image.open(file)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from what the header holds; asking Pillow for more would decode a whole PNG."""
    block = image.info.get("exif")
    if not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        return int(exif.get(EXIF_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError):
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        shallow = np.clip(deep // 257 if deep.max(initial=0) > 255 else deep, 0, 255).astype(np.uint8)
        return Image.fromarray(shallow).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _ends_properly(file: BinaryIO, kind: str | None) -> bool:
    """Whether the closing mark of the format is where it should be; True for formats without one."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if kind == "BMP":
        return int.from_bytes(head[2:6], "little") <= length
    mark = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}.get(kind or "")
    file.seek(max(length - TAIL, 0))
    return mark is None or mark in file.read()


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(error) or type(error).__name__
