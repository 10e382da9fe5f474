"""How the tools go through a folder of images, and write pictures of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.findings import listed
from library.data.image_file import image_endings
from library.files.atomic import replacing

QUALITY = 100
"""Of formats that lose something; the others pay no heed to it."""


def images_in(folder: Path) -> list[Path]:
    """The images that lie in `folder` itself, sorted; ValueError if there is no such folder or no image in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    endings = image_endings()
    images = [path for path in sorted(folder.iterdir()) if os.path.splitext(path.name)[1] in endings and path.is_file()]
    if not images:
        raise ValueError(f"{folder}: there are no images in it")
    return images


def for_each(images: Sequence[Path], work: Callable[[Path], None]) -> None:
    """Do `work` with every image; afterwards one ValueError lists those for which it raised one."""
    failed: dict[Path, str] = {}
    for image in images:
        try:
            work(image)
        except ValueError as error:
            failed[image] = str(error)
    if failed and len(images) == 1:
        raise ValueError(f"{images[0]}: {failed[images[0]]}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(images)} images cannot be read; repair or remove:\n{listed(failed)}")


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write [H, W], [H, W, 3] or [H, W, 4] uint8 in the format that the ending of `path` names.

    The folder is made if need be. ValueError when the ending is none, or stands for a format that cannot be written.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: expected a name that ends in .png, .jpg or .webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            Image.fromarray(picture).save(temporary, quality=QUALITY)
        except (KeyError, OSError) as error:
            raise ValueError(f"{path}: cannot be written: {error}") from error
