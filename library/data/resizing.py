"""How the images of a folder are made smaller, to one size or several."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.image_file import image_endings
from library.data.picture_files import for_each, images_in, save_picture
from library.data.pixels import Size, alpha_of, crop, load_rgba, resize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resizing:
    """What becomes of every image."""

    areas: tuple[Size, ...]
    """Each image is brought to the area of each of these; none is enlarged."""
    divisible_by: int = 1
    interpolation: str = "area"
    suffix: str = ".jpg"
    """Format of the pictures; only .png keeps alpha."""
    copies_associated: bool = False
    """Whether the files beside an image that share its stem are copied under the new name, too."""


def areas_of(text: str) -> tuple[Size, ...]:
    """`512x512,384x384`, or pairs `512,512`, as sizes; ValueError says what was expected."""
    parts = text.lower().split(",")
    if "x" not in text.lower():
        parts = [f"{width}x{height}" for width, height in zip(parts[::2], [*parts[1::2], ""])]
    sizes = []
    for part in parts:
        sides = [side.strip() for side in part.split("x")]
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"expected sizes such as 512x512,384x384, got {text!r}")
        sizes.append((int(sides[0]), int(sides[1])))
    return tuple(sizes)


def shrunk(image: np.ndarray, area: Size, divisible_by: int, interpolation: str) -> np.ndarray:
    """`image` [H, W, C] scaled down to the area of `area` and cut around its middle to sides that can be divided.

    An image of that area or less keeps its size. ValueError if a side would be shorter than `divisible_by`.
    """
    height, width = image.shape[:2]
    scale = math.sqrt(area[0] * area[1] / (width * height))
    if scale < 1:
        width, height = (max(round(side * scale), 1) for side in (width, height))
    cut = (width - width % divisible_by, height - height % divisible_by)
    if 0 in cut:
        raise ValueError(f"{width}x{height} pixels, which leaves nothing with --divisible_by {divisible_by}")
    return crop(resize(image, (width, height), interpolation), cut)


def resize_folder(source: Path, target: Path, options: Resizing) -> None:
    """Write all files of `source` into `target`, and every image once more for each size that changes it.

    A picture is called after its image and the size, `name+512x512.jpg`. One ValueError lists the images that cannot
    be read, after all others are done.
    """
    images = images_in(source)
    _refuse_equal_names(images, options)
    target.mkdir(parents=True, exist_ok=True)
    endings = image_endings()
    beside: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if not path.is_file():
            continue
        if not (target / path.name).exists() or not path.samefile(target / path.name):
            shutil.copy2(path, target / path.name)
        if os.path.splitext(path.name)[1] not in endings:
            beside.setdefault(path.stem, []).append(path)
    made = [0]

    def make(path: Path) -> None:
        made[0] += _make_all(path, target, options, beside.get(path.stem, []) if options.copies_associated else [])

    for_each(images, make)
    logger.info("%s: %d images and %d smaller ones of them", target, len(images), made[0])


def _make_all(path: Path, target: Path, options: Resizing, associated: Sequence[Path]) -> int:
    """The pictures of one image; how many there are."""
    image = load_rgba(path)
    if options.suffix != ".png" or alpha_of(image).min() == 1:
        image = np.ascontiguousarray(image[:, :, :3])
    made, only_cut = 0, False
    for area in options.areas:
        picture = shrunk(image, area, options.divisible_by, options.interpolation)
        if image.shape[0] * image.shape[1] <= area[0] * area[1]:
            if only_cut or picture.shape == image.shape:
                logger.info("%s is not larger than %dx%d and stays as it is", path.name, *area)
                continue
            only_cut = True
        name = f"{path.stem}+{area[0]}x{area[1]}"
        save_picture(picture, target / f"{name}{options.suffix}")
        for file in associated:
            shutil.copy2(file, target / f"{name}{file.suffix}")
        made += 1
    return made


def _refuse_equal_names(images: Sequence[Path], options: Resizing) -> None:
    stems: dict[str, Path] = {}
    for image in images:
        other = stems.setdefault(image.stem, image)
        if other is not image:
            name = f"{image.stem}+{options.areas[0][0]}x{options.areas[0][1]}{options.suffix}"
            raise ValueError(f"{other} and {image.name} would both become {name}; rename one of them")
