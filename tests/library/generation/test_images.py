"""Do pictures get the right names and pixels?"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.generation.images import contact_sheet, sample_file_name, save_png, to_image

NOW = datetime(2024, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("output_name", "epoch", "seed", "expected"),
    [
        ("lora", 2, 42, "lora_e000002_03_20240102030405_42.png"),
        (None, None, 0, "000010_03_20240102030405_0.png"),
        ("", 0, None, "e000000_03_20240102030405.png"),
    ],
)
def test_a_file_name_tells_epoch_or_step_and_the_seed(
    output_name: str | None, epoch: int | None, seed: int | None, expected: str
) -> None:
    assert sample_file_name(output_name, 10, epoch, 3, seed, NOW) == expected


def test_pixels_are_scaled_rounded_and_clipped(tmp_path: Path) -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, 9.0, -9.0, 0.004])
    image = to_image(values.view(1, 2, 3).expand(3, 2, 3))
    save_png(image, tmp_path / "made" / "a.png")
    with Image.open(tmp_path / "made" / "a.png") as read:
        assert read.size == (3, 2)
        assert [read.getpixel((n % 3, n // 3))[0] for n in range(6)] == [0, 255, 128, 255, 0, 128]


def test_a_sheet_shows_every_picture_and_its_caption() -> None:
    colors = ["red", "green", "blue"]
    sheet = contact_sheet([Image.new("RGB", (40, 20), color) for color in colors], colors, columns=2, gap=4)
    assert sheet.size == (2 * 44 + 4, 2 * 40 + 4)
    assert [sheet.getpixel(place) for place in ((5, 5), (50, 5), (5, 46))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert sheet.getpixel((50, 46)) == (255, 255, 255)
    under_first = sheet.crop((4, 24, 44, 40)).convert("L")
    assert under_first.getextrema()[0] < 64


def test_a_long_caption_stays_below_its_picture() -> None:
    sheet = contact_sheet([Image.new("RGB", (40, 20))] * 2, ["a very long 猫 caption" * 9, ""], columns=2, gap=4)
    right_cell = sheet.crop((48, 24, 88, 40)).convert("L")
    assert right_cell.getextrema() == (255, 255)
