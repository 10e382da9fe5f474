"""How a face in an image is levelled, scaled, cut out and named for face_crop_aug_range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from library.data.augment import Face
from library.data.buckets import covering
from library.data.pixels import Size, resize

Point = tuple[float, float]

COLOUR_OF_BOX = (255, 0, 255)


@dataclass(frozen=True)
class DetectedFace:
    """A face in pixels of an image, as a detector found it."""

    centre: Point
    size: Point
    """Width and height."""
    left_eye: Point
    """The eye on the left in an upright picture."""
    right_eye: Point
    score: float = 1.0

    @property
    def longest(self) -> float:
        """The longer side."""
        return max(self.size)

    def moved(self, move: Callable[[Point], Point]) -> DetectedFace:
        """The face after every point of the image was moved; its size stays."""
        return replace(self, centre=move(self.centre), left_eye=move(self.left_eye), right_eye=move(self.right_eye))

    def named(self) -> Face:
        """Centre and size in whole pixels."""
        centre_x, centre_y, width, height = (int(value + 0.5) for value in (*self.centre, *self.size))
        return centre_x, centre_y, width, height


@dataclass(frozen=True)
class Cutting:
    """What is done to an image around a face, in this order; None leaves a step out."""

    rotate: bool = False
    """Turn the image so that the eyes are level."""
    resize_face_size: int | None = None
    """Scale the image so that the longer side of the face has so many pixels."""
    crop_ratio: tuple[float, float] | None = None
    """Keep so many widths and heights of the face."""
    resize_fit: bool = False
    """Shrink what is left until it just covers `crop_size`."""
    crop_size: Size | None = None
    """Keep so many pixels around the face."""


def chosen_faces(
    faces: Sequence[DetectedFace], min_size: int | None, max_size: int | None, *, all_of_them: bool
) -> list[DetectedFace]:
    """The faces of a wanted size, surest first; only the surest unless `all_of_them`. Sizes are of the longer side."""
    fitting = [face for face in faces if (min_size or 0) <= face.longest <= (max_size or math.inf)]
    return sorted(fitting, key=lambda face: -face.score)[: None if all_of_them else 1]


def cut_out(image: np.ndarray, face: DetectedFace, cutting: Cutting) -> tuple[np.ndarray, DetectedFace]:
    """`image` [H, W, C] uint8 after every step of `cutting`, and where the face is in it now."""
    if cutting.rotate:
        image, face = _levelled(image, face)
    if cutting.resize_face_size is not None:
        image, face = _scaled(image, face, cutting.resize_face_size / face.longest)
    if cutting.crop_ratio is not None:
        width, height = (side * times for side, times in zip(face.size, cutting.crop_ratio, strict=True))
        image, face = _cropped(image, face, (round(width), round(height)))
    if cutting.crop_size is not None:
        if cutting.resize_fit:
            size = (image.shape[1], image.shape[0])
            image, face = _scaled(image, face, min(1.0, covering(size, cutting.crop_size)[0] / size[0]))
        image, face = _cropped(image, face, cutting.crop_size)
    return image, face


def file_name(stem: str, number: int | None, face: DetectedFace) -> str:
    """`stem_cx_cy_w_h.png`, with the number of the face before it when one image gives several."""
    place = "" if number is None else f"_{number:02d}"
    return f"{stem}{place}_" + "_".join(f"{value:04d}" for value in face.named()) + ".png"


def with_box(image: np.ndarray, face: DetectedFace) -> np.ndarray:
    """A copy of `image` with a frame around the face."""
    centre_x, centre_y, width, height = face.named()
    corner = (centre_x - width // 2, centre_y - height // 2)
    return cv2.rectangle(image.copy(), (*corner, width, height), COLOUR_OF_BOX, 2)


def _levelled(image: np.ndarray, face: DetectedFace) -> tuple[np.ndarray, DetectedFace]:
    """The image turned around the face; what comes in from outside repeats the edge."""
    (left_x, left_y), (right_x, right_y) = face.left_eye, face.right_eye
    angle = math.degrees(math.atan2(right_y - left_y, right_x - left_x))
    turn = cv2.getRotationMatrix2D(face.centre, angle, 1.0)
    size = (image.shape[1], image.shape[0])
    turned = cv2.warpAffine(image, turn, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)

    def moved(point: Point) -> Point:
        x, y = turn @ np.array([*point, 1.0])
        return float(x), float(y)

    return turned, face.moved(moved)


def _scaled(image: np.ndarray, face: DetectedFace, scale: float) -> tuple[np.ndarray, DetectedFace]:
    size = (max(int(image.shape[1] * scale + 0.5), 1), max(int(image.shape[0] * scale + 0.5), 1))

    def scaled(point: Point) -> Point:
        return point[0] * scale, point[1] * scale

    return resize(image, size), replace(face.moved(scaled), size=scaled(face.size))


def _cropped(image: np.ndarray, face: DetectedFace, size: Size) -> tuple[np.ndarray, DetectedFace]:
    """`size` pixels with the face in the middle, or as near to it as the image goes; no more than there are."""
    height, width = image.shape[:2]
    left, top = (
        int(max(0, min(centre - length / 2, side - length)))
        for centre, length, side in zip(face.centre, size, (width, height), strict=True)
    )

    def shifted(point: Point) -> Point:
        return point[0] - left, point[1] - top

    return image[top : top + max(size[1], 1), left : left + max(size[0], 1)], face.moved(shifted)
