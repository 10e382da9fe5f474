"""How a picture is changed anew each time it is used: its colours, and a crop around a face."""

from __future__ import annotations

from pathlib import Path
from random import Random

import cv2
import numpy as np

from library.data.pixels import resize

Size = tuple[int, int]
"""Width and height in pixels."""

Face = tuple[int, int, int, int]
"""Centre x, centre y, width and height in pixels of the image file."""

COLOUR_RATE = 0.33
"""Share of the pictures whose colours are changed; half of these in hue, the rest in gamma."""
HUE_SHIFT = 8
"""Largest shift of the hue, in steps of two degrees."""
GAMMA = (0.95, 1.05)
HUES = 180
"""Hues in OpenCV's 8-bit HSV."""

SMALLEST_MOVED_FACE = 40
"""Faces with a smaller longer side, in pixels, always stay in the middle of the crop."""


def colour_augmented(image: np.ndarray, random: Random) -> np.ndarray:
    """`image` [H, W, 3 or 4] uint8 RGB with slightly other colours a third of the time; alpha stays as it is.

    Draws: whether, hue or gamma, how much. A positive draw turns red towards blue; gamma is taken of values from 0
    to 1, and the result is cut to whole levels.
    """
    if random.random() > COLOUR_RATE:
        return image
    change = _other_hue if random.random() > 0.5 else _other_gamma
    changed = change(image[:, :, :3], random)
    return np.concatenate([changed, image[:, :, 3:]], axis=2) if image.shape[2] > 3 else changed


def _other_hue(colours: np.ndarray, random: Random) -> np.ndarray:
    shift = random.uniform(-HUE_SHIFT, HUE_SHIFT)
    # Reading RGB as BGR mirrors the circle of hues: only the direction of the shift differs.
    circle = cv2.cvtColor(colours, cv2.COLOR_BGR2HSV)
    # One row for every hue that there is; a sum of an 8-bit picture and a fraction would cost eight times the memory.
    circle[:, :, 0] = ((np.arange(HUES) + shift) % HUES).astype(np.uint8)[circle[:, :, 0]]
    return cv2.cvtColor(circle, cv2.COLOR_HSV2BGR)


def _other_gamma(colours: np.ndarray, random: Random) -> np.ndarray:
    gamma = random.uniform(*GAMMA)
    return ((np.arange(256) / 255) ** gamma * 255).astype(np.uint8)[colours]


def face_of(path: Path) -> Face | None:
    """The face that a name ending in `_cx_cy_w_h` tells of, as tools/detect_face_rotate.py writes it; else None."""
    parts = path.stem.split("_")
    numbers = parts[-4:]
    if len(parts) < 5 or not all(part.isdecimal() for part in numbers):
        return None
    centre_x, centre_y, width, height = (int(part) for part in numbers)
    return (centre_x, centre_y, width, height) if width and height else None


def face_crop(
    image: np.ndarray,
    face: Face,
    zoom: tuple[float, float],
    target: Size,
    random_crop: bool,
    random: Random,
    interpolation: str | None = None,
) -> np.ndarray:
    """`target` pixels of `image` [H, W, C] around `face`; the shorter side is `zoom` (least, most) faces long.

    The image is never enlarged for that, only when it is smaller than `target`. Draws: the scale if there is a
    choice, then for y and for x how far the face lies off the middle: anywhere with `random_crop`, else by up to a
    twentieth of its size, and not at all when `zoom` leaves no choice or the face is small.
    """
    height, width = image.shape[:2]
    centre_x, centre_y, *sides = face
    longest, shortest = max(sides), min(target)
    scale = _scale(longest, zoom, (width, height), target, random)
    resized = (_rounded(width * scale), _rounded(height * scale))
    moved = 0
    if zoom[0] != zoom[1] and longest > shortest // 10 and longest >= SMALLEST_MOVED_FACE:
        moved = longest

    def start(centre: int, side: int, length: int) -> int:
        offset = 0
        if random_crop:
            reach = max(centre, side - centre)
            offset = random.randint(0, reach) + random.randint(0, reach) - reach
        elif moved:
            offset = random.randint(-moved // 20, moved // 20)
        return max(0, min(centre - length // 2 + offset, side - length))

    top = start(_inside(centre_y * scale, resized[1]), resized[1], target[1])
    left = start(_inside(centre_x * scale, resized[0]), resized[0], target[0])
    return resize(image, resized, interpolation)[top : top + target[1], left : left + target[0]]


def _scale(face: int, zoom: tuple[float, float], size: Size, target: Size, random: Random) -> float:
    """How much the image is shrunk so that a face of `face` pixels stands in the crop as `zoom` asks."""
    covering = max(target[0] / size[0], target[1] / size[1])
    least, most = (max(covering, min(1.0, min(target) / (face * times))) for times in reversed(zoom))
    return random.uniform(least, most) if least < most else most


def _inside(place: float, side: int) -> int:
    return min(max(_rounded(place), 0), side)


def _rounded(value: float) -> int:
    return int(value + 0.5)
