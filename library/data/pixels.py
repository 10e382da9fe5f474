"""What an image file looks like as a training picture: read, turn upright, scale, crop."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from random import Random

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.buckets import centre_crop
from library.data.image_file import BROKEN, UPRIGHT, ends_properly, open_image, orientation, reason
from library.data.image_header import photograph_header
from library.data.levels import COLOUR

Size = tuple[int, int]
"""Width and height in pixels."""

OPENCV = {
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos4": cv2.INTER_LANCZOS4,
}
PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

JPEG = ("JPEG", "MPO")
"""Pillow's names of photographs; the second holds several, of which the first is read."""


def image_size(path: Path) -> Size:
    """Width and height of the upright image, from the header; ValueError says what is wrong with the file.

    A file that seems to end early is decoded, to be sure.
    """
    try:
        with open(path, "rb") as file:
            header = photograph_header(file)
            if header is not None and ends_properly(file, "JPEG"):
                (width, height), turn = header
                return (height, width) if turn >= 5 else (width, height)
            file.seek(0)
            image = open_image(file)
            width, height = image.size
            turned = orientation(image) >= 5
            if not ends_properly(file, image.format):
                image.load()
    except BROKEN as error:
        raise ValueError(reason(error)) from error
    return (height, width) if turned else (width, height)


def load_rgb(source: Path | bytes) -> np.ndarray:
    """[H, W, 3] uint8 of the upright image, alpha dropped; ValueError says what is wrong with the file.

    `source` is a path, or the file's bytes. Sixteen bits become eight; of an animation the first frame is read.
    """
    return _load(source, "RGB")


def load_rgba(source: Path | bytes) -> np.ndarray:
    """[H, W, 4] uint8, otherwise as `load_rgb`; an image without alpha is opaque."""
    return _load(source, "RGBA")


def alpha_of(picture: np.ndarray) -> np.ndarray:
    """[H, W] float32 in 0..1: the last channel of a picture [H, W, 4] uint8."""
    assert picture.shape[2] == 4, picture.shape
    return picture[:, :, 3].astype(np.float32) / 255


def glance(content: bytes, size: Size) -> tuple[str, np.ndarray]:
    """The format that a file's bytes are in, and [H, W, 3] uint8 of the upright image squeezed to `size`.

    All of the image is decoded, photographs at a fraction of their size; ValueError says what is wrong with it.
    """
    try:
        image = open_image(io.BytesIO(content))
        kind, turn = image.format or "", UPRIGHT.get(orientation(image))
        image.draft(None, (4 * max(size), 4 * max(size)))
        upright = image if turn is None else image.transpose(turn)
        return kind, np.asarray(_converted(upright, "RGB").resize(size, Image.Resampling.BOX))
    except BROKEN as error:
        raise ValueError(reason(error)) from error


def make_picture(
    source: Path | bytes,
    resized: Size,
    bucket: Size,
    interpolation: str | None = None,
    random: Random | None = None,
    *,
    alpha: bool = False,
) -> np.ndarray:
    """[H, W, 3] uint8 of size `bucket`: read, scaled to `resized`, cropped in the middle or by `random`.

    With `alpha` there is a fourth channel.
    """
    image = load_rgba(source) if alpha else load_rgb(source)
    return crop(resize(image, resized, interpolation), bucket, random)


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


def to_levels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 of one size -> [B, 3, H, W] uint8."""
    height, width, channels = pictures[0].shape
    levels = np.empty((len(pictures), channels, height, width), dtype=np.uint8)
    for picture, planes in zip(pictures, levels, strict=True):
        whole = np.ascontiguousarray(picture)  # a crop or a mirror image is a view
        for channel in range(channels):
            cv2.extractChannel(whole, channel, dst=planes[channel])
    return torch.from_numpy(levels)


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 of one size -> [B, 3, H, W] float32 in [-1, 1]."""
    return COLOUR.numbers(to_levels(pictures))


def _load(source: Path | bytes, mode: str) -> np.ndarray:
    """The upright image in Pillow's `mode`, RGB or RGBA."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        image = open_image(io.BytesIO(content))
        turn = UPRIGHT.get(orientation(image))
        if turn is None and mode == "RGB":
            decoded = _photograph(content, image)
            if decoded is not None:
                return decoded
        upright = image if turn is None else image.transpose(turn)
        return np.asarray(_converted(upright, mode))
    except BROKEN as error:
        raise ValueError(reason(error)) from error


def _photograph(content: bytes, image: Image.Image) -> np.ndarray | None:
    """An ordinary JPEG by OpenCV: the same pixels in half of the time, since Pillow copies them twice more.

    None for everything else, and for a file that is cut short, which OpenCV would fill up with grey.
    """
    if image.format not in JPEG or image.mode != "RGB" or not ends_properly(io.BytesIO(content), "JPEG"):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return decoded if decoded is not None and decoded.shape[1::-1] == image.size else None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`, RGB or RGBA; what is transparent keeps its colour."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        image = _shallow(image)
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        image = image.convert("RGBA")
    return image.convert(mode)


def _shallow(image: Image.Image) -> Image.Image:
    """Sixteen-bit grey as eight-bit grey; 32-bit grey is taken for the one or the other by its brightest pixel."""
    deep = np.asarray(image)
    if image.mode.startswith("I;16") or deep.max(initial=0) > 255:
        deep = deep // 257
    return Image.fromarray(np.clip(deep, 0, 255).astype(np.uint8))
