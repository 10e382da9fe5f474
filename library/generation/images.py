"""Finished pictures: their file names, their pixels as PNG, and many of them on one sheet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

CAPTION_HEIGHT = 16
"""Pixels under a picture of a contact sheet, enough for pillow's built-in font."""


def sample_file_name(
    output_name: str | None, step: int, epoch: int | None, index: int, seed: int | None, now: datetime
) -> str:
    """`[<output_name>_]<e000001|000010>_<index>_<time>[_<seed>].png`: by epoch when there is one, else by step."""
    prefix = f"{output_name}_" if output_name else ""
    when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    suffix = "" if seed is None else f"_{seed}"
    return f"{prefix}{when}_{index:02d}_{now:%Y%m%d%H%M%S}{suffix}.png"


def sample_index(name: str) -> int:
    """The `index` that `sample_file_name` has put into `name`."""
    found = re.search(r"_(\d{2,})_\d{14}(_\d+)?\.png$", name)
    assert found is not None, f"{name} is not the name of a preview"
    return int(found[1])


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] on any device -> an RGB picture; what lies outside is clipped."""
    values = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().contiguous().numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write `image`, making the folder when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def free_name(path: Path) -> Path:
    """`path`, or with a number behind its name where there is such a file already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int, gap: int = 8) -> Image.Image:
    """`images` in rows of `columns` on white, each with its caption below, in cells as large as the largest."""
    assert images and len(images) == len(captions) and columns > 0
    width = max(image.width for image in images)
    height = max(image.height for image in images) + CAPTION_HEIGHT
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions)):
        x = gap + number % columns * (width + gap)
        y = gap + number // columns * (height + gap)
        sheet.paste(image, (x, y))
        draw.text((x, y + image.height + 2), _fitting(caption, draw, width), fill="black")
    return sheet


def _fitting(caption: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """As much of `caption` as fits into `width` pixels; what the built-in font lacks becomes a question mark."""
    caption = caption.replace("\n", " ").encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(caption) <= width:
        return caption
    while caption and draw.textlength(caption + "...") > width:
        caption = caption[:-1]
    return caption + "..."
