"""Is the picture for a ControlNet shown to it in the right size and range?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.models.control_image import read_control


def test_an_image_of_any_mode_and_shape_is_scaled_to_the_picture(tmp_path: Path) -> None:
    image = Image.new("LA", (30, 10), (255, 128))
    image.paste((0, 255), (0, 0, 15, 10))
    image.save(tmp_path / "edges.png")
    found = read_control(tmp_path / "edges.png", height=16, width=32)
    assert found.shape == (1, 3, 16, 32) and found.dtype == torch.float32
    assert found[0, :, 8, 2].tolist() == [-1.0] * 3 and found[0, :, 8, 29].tolist() == [1.0] * 3


def test_a_missing_file_and_a_file_that_is_no_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file .*nowhere.png for the ControlNet"):
        read_control(tmp_path / "nowhere.png", 16, 16)
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text.png is no image that the ControlNet"):
        read_control(tmp_path / "text.png", 16, 16)
