"""Colour changes and face crops give the recorded pixels and places; gamma is held to its formula."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from library.data.augment import colour_augmented, face_crop, face_of

FACTS = Path(__file__).resolve().parents[2] / "facts/dataset"
CASES = json.loads((FACTS / "images.json").read_text(encoding="utf-8"))["cases"]


def of_kind(operation: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["op"] == operation]


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(FACTS / "images_expected.safetensors")


@pytest.mark.parametrize("case", of_kind("colour"), ids=lambda case: case["key"])
def test_colours_change_as_recorded(case: dict[str, Any], recorded: dict[str, np.ndarray]) -> None:
    source = recorded["colour_source"]
    changed = colour_augmented(source, Random(case["seed"]))
    expected = recorded[case["key"]]
    if case["kind"] == "gamma":  # recorded with the power of values from 0 to 255; here from 0 to 1
        expected = ((source / 255.0) ** case["amount"] * 255).astype(np.uint8)
        assert not np.array_equal(changed, recorded[case["key"]])
    assert changed.dtype == np.uint8 and np.array_equal(changed, expected)


def test_gamma_keeps_black_and_white_and_changes_grey_little() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    for seed in range(100):  # a change of hue leaves greys as they are
        changed = colour_augmented(ramp, Random(seed))[0, :, 0].astype(int)
        assert (changed[0], changed[255]) == (0, 255)
        assert np.abs(changed - np.arange(256)).max() <= 6 and (np.diff(changed) >= 0).all()


def test_a_change_of_colour_leaves_alpha_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    changes = 0
    for seed in range(60):
        changed = colour_augmented(image, Random(seed))
        assert changed.shape == image.shape and np.array_equal(changed[:, :, 3], image[:, :, 3])
        changes += not np.array_equal(changed, image)
    assert 8 <= changes <= 32  # a third of 60


def test_the_source_picture_is_not_written_to() -> None:
    image = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    before = image.copy()
    for seed in range(30):
        colour_augmented(image, Random(seed))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("case", of_kind("face_crop"), ids=lambda case: f"seed {case['seed']}")
def test_face_crops_lie_where_recorded(case: dict[str, Any]) -> None:
    width, height = case["image"]
    image = np.zeros((height, width, 3), dtype=np.uint8)
    resizes: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.data.augment.resize", lambda image, size, _: resizes.append(size) or place_names(size))
        cropped = face_crop(
            image,
            tuple(case["face_cx_cy_w_h"]),
            tuple(case["range"]),
            tuple(case["target"]),
            case["random_crop"],
            Random(case["seed"]),
        )
    assert resizes == [tuple(case["scaled_to"])]
    assert cropped[0, 0].tolist() == case["crop_xy"]
    assert list(cropped.shape[1::-1]) == case["shape_wh"]


def place_names(size: tuple[int, int]) -> np.ndarray:
    """[H, W, 2]: each pixel holds its own x and y."""
    return np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), axis=2)


def test_a_face_crop_takes_the_pixels_around_the_face() -> None:
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    image[80:120, 180:220] = 255  # the face: centre 200, 100
    cropped = face_crop(image, (200, 100, 40, 40), (2.0, 2.0), (80, 80), False, Random(0))
    assert cropped.shape == (80, 80, 3)
    rows, columns = np.nonzero(cropped[:, :, 0] > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 59, 20, 59)


@pytest.mark.parametrize("size", [(30, 200), (200, 30), (63, 63), (64, 64), (1000, 65)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_a_face_crop_always_fills_the_target(size: tuple[int, int], random_crop: bool) -> None:
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for seed in range(20):
        for face in ((5, 5, 20, 10), (500, 500, 64, 64), (size[0], 0, 1, 1)):
            assert face_crop(image, face, (1.0, 3.0), (64, 64), random_crop, Random(seed)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("anna_120_80_40_50.png", (120, 80, 40, 50)),
        ("a_b_c_1_2_3_4.jpg", (1, 2, 3, 4)),
        ("1_2_3_4.png", None),
        ("anna_120_80_40.png", None),
        ("anna_120_80_40_x.png", None),
        ("anna_120_-80_40_50.png", None),
        ("anna_1_2_0_4.png", None),
        ("anna_1_2_²_4.png", None),
    ],
)
def test_a_face_is_read_off_the_name(name: str, face: tuple[int, int, int, int] | None) -> None:
    assert face_of(Path(name)) == face
