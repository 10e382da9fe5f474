"""What does the demo train on? A dozen captioned pictures of coloured shapes, drawn here."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIZES = [(192, 192), (160, 320), (320, 160)]
COLOURS = {"orange": (245, 130, 32), "red": (215, 38, 38), "yellow": (245, 214, 40), "white": (240, 240, 240)}
SHAPES = {"circle": 0, "square": 4, "star": 5}
"""Name -> number of corners."""
BACKGROUND = (24, 40, 96)

CAPTION = "drawing, one {colour} {shape}, plain blue background, centred, flat colours"


def write_pictures(folder: Path) -> int:
    """Write PNG files with a .txt caption beside each and return how many; the same files every time."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for index, (colour, shape) in enumerate(pairs):
        size = SIZES[(index + index // len(SHAPES)) % len(SIZES)]
        picture = draw(size, colour, shape)
        name = f"{index + 1:02d}_{colour}_{shape}"
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(CAPTION.format(colour=colour, shape=shape) + "\n", encoding="utf-8")
    return len(pairs)


def draw(size: tuple[int, int], colour: str, shape: str) -> Image.Image:
    """A picture of `size` (width, height) with one shape in its middle."""
    large = tuple(4 * side for side in size)  # drawn large and made small, so that edges are smooth
    picture = Image.new("RGB", (large[0], large[1]), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    x, y, radius = large[0] / 2, large[1] / 2, 0.36 * min(large)
    corners = SHAPES[shape]
    if corners == 0:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    else:
        pen.polygon(_outline(x, y, radius, corners), fill=COLOURS[colour])
    return picture.resize(size, Image.Resampling.LANCZOS)


def words() -> list[str]:
    """Every word of the captions, for the tokenizer."""
    text = " ".join(CAPTION.format(colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES)
    return sorted(set(text.replace(",", " ").split()))


def _outline(x: float, y: float, radius: float, corners: int) -> list[tuple[float, float]]:
    """A polygon, or a star if the corners are odd."""
    is_star = corners % 2 == 1
    points = 2 * corners if is_star else corners
    turn = -math.pi / 2 if is_star else math.pi / 4
    outline = []
    for point in range(points):
        reach = radius * (0.45 if is_star and point % 2 else 1.0)
        angle = turn + 2 * math.pi * point / points
        outline.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return outline
