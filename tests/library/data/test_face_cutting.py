"""Faces are levelled, scaled and cut out, and the file name says where they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.data.augment import face_of
from library.data.face_cutting import Cutting, DetectedFace, chosen_faces, cut_out, file_name, with_box


def scene(centre: tuple[int, int] = (120, 80), size: int = 40) -> tuple[np.ndarray, DetectedFace]:
    """An image of 300x200 with a white face, a red and a blue eye in it, and where they are."""
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    x, y = centre
    half, quarter = size // 2, size // 4
    image[y - half : y + half, x - half : x + half] = 255
    for eye_x, colour in ((x - quarter, (255, 0, 0)), (x + quarter, (0, 0, 255))):
        image[y - 3 : y + 3, eye_x - 3 : eye_x + 3] = colour
    face = DetectedFace((x, y), (size, size), (x - quarter, y), (x + quarter, y))
    return image, face


def white_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is not black."""
    rows, columns = np.nonzero(image.max(axis=2) > 127)
    return int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def test_without_steps_the_image_stays_and_the_name_tells_of_the_face() -> None:
    image, face = scene()
    picture, same = cut_out(image, face, Cutting())
    assert np.array_equal(picture, image) and same == face
    assert file_name("anna_b", None, same) == "anna_b_0120_0080_0040_0040.png"
    assert file_name("anna_b", 2, same) == "anna_b_02_0120_0080_0040_0040.png"
    assert face_of(Path("anna_b_02_0120_0080_0040_0040.png")) == (120, 80, 40, 40)


@pytest.mark.parametrize("degrees", [-170, -60, -10, 25, 90, 180])
def test_eyes_are_made_level(degrees: int) -> None:
    image, face = scene()
    turn = math.radians(degrees)
    ends = [(120 + sign * 30 * math.cos(turn), 80 + sign * 30 * math.sin(turn)) for sign in (-1, 1)]
    for (x, y), colour in zip(ends, ((255, 0, 0), (0, 0, 255)), strict=True):
        image[int(y) - 5 : int(y) + 6, int(x) - 5 : int(x) + 6] = colour
    picture, level = cut_out(image, replace(face, left_eye=ends[0], right_eye=ends[1]), Cutting(rotate=True))
    assert picture.shape == image.shape and level.centre == pytest.approx((120, 80))
    assert level.left_eye == pytest.approx((90, 80)) and level.right_eye == pytest.approx((150, 80))
    assert picture[80, 90].tolist() == [255, 0, 0] and picture[80, 150].tolist() == [0, 0, 255]


def test_a_face_gets_the_size_that_was_asked_for() -> None:
    image, face = scene()
    picture, smaller = cut_out(image, face, Cutting(resize_face_size=20))
    assert picture.shape == (100, 150, 3) and smaller.named() == (60, 40, 20, 20)
    assert white_box(picture) == (50, 30, 20, 20)


@pytest.mark.parametrize(
    ("centre", "corner"), [((120, 80), (30, 30)), ((20, 20), (0, 0)), ((280, 180), (60, 60)), ((120, 20), (30, 0))]
)
def test_the_face_is_in_the_middle_or_as_near_as_the_image_goes(
    centre: tuple[int, int], corner: tuple[int, int]
) -> None:
    image, face = scene(centre)
    picture, moved = cut_out(image, face, Cutting(crop_size=(100, 100)))
    assert picture.shape == (100, 100, 3)
    assert white_box(picture) == (*corner, 40, 40)
    assert moved.named() == (corner[0] + 20, corner[1] + 20, 40, 40)


def test_a_ratio_counts_in_faces() -> None:
    image, face = scene()
    picture, moved = cut_out(image, face, Cutting(crop_ratio=(3.0, 2.0)))
    assert picture.shape == (80, 120, 3) and moved.named() == (60, 40, 40, 40)


def test_what_is_cut_is_shrunk_first_so_that_the_shorter_side_fits() -> None:
    image, face = scene((150, 100))
    picture, moved = cut_out(image, face, Cutting(resize_fit=True, crop_size=(100, 100)))
    assert picture.shape == (100, 100, 3)
    assert moved.named() == (50, 50, 20, 20) and white_box(picture) == (40, 40, 20, 20)


def test_nothing_is_enlarged_to_fit() -> None:
    image, face = scene()
    picture, moved = cut_out(image, face, Cutting(resize_fit=True, crop_size=(400, 150)))
    assert picture.shape == (150, 300, 3) and moved.size == (40, 40)


def test_all_steps_together() -> None:
    image, face = scene((150, 100))
    cutting = Cutting(rotate=True, resize_face_size=80, crop_ratio=(4.0, 4.0), resize_fit=True, crop_size=(64, 64))
    picture, moved = cut_out(image, face, cutting)
    assert picture.shape == (64, 64, 3) and moved.named() == (32, 32, 16, 16)


def test_faces_are_chosen_by_size_and_certainty() -> None:
    sizes = {10: 0.9, 40: 0.5, 50: 0.8, 200: 0.99}
    faces = [DetectedFace((0, 0), (size / 2, size), (0, 0), (1, 0), score) for size, score in sizes.items()]
    assert [face.longest for face in chosen_faces(faces, None, None, all_of_them=False)] == [200]
    assert [face.longest for face in chosen_faces(faces, 20, 100, all_of_them=True)] == [50, 40]
    assert [face.longest for face in chosen_faces(faces, 20, 100, all_of_them=False)] == [50]
    assert chosen_faces(faces, 300, None, all_of_them=True) == []


def test_a_frame_is_drawn_on_a_copy() -> None:
    image, face = scene()
    framed = with_box(image, face)
    assert framed[60, 120].tolist() == [255, 0, 255] and image[60, 120].tolist() == [255, 255, 255]
