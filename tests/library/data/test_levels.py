"""Eight-bit levels and the numbers they stand for, bit for bit."""

from __future__ import annotations

import pytest
import torch

from library.data.items import Batch
from library.data.levels import COLOUR, SHARE, Scale, looked_up

EVERY = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)


def formula(levels: torch.Tensor, scale: Scale) -> torch.Tensor:
    shares = levels.float() / 255
    return shares if scale is SHARE else (shares - 0.5) / 0.5


@pytest.mark.parametrize("scale", [COLOUR, SHARE])
def test_every_level_becomes_the_number_of_the_formula_on_every_path(scale: Scale) -> None:
    expected = formula(EVERY, scale)
    assert torch.equal(scale.numbers(EVERY), expected) and scale.numbers(EVERY).is_contiguous()
    assert torch.equal(looked_up(EVERY, torch.from_numpy(scale.values)), expected)  # what devices but the CPU do
    assert expected.unique().numel() == 256


@pytest.mark.parametrize("scale", [COLOUR, SHARE])
def test_views_and_single_pixels_become_numbers_too(scale: Scale) -> None:
    for view in (EVERY[..., 17:103], EVERY.flip(-1), EVERY.transpose(-1, -2), EVERY[:1, :1, :1, :1]):
        numbers = scale.numbers(view)
        assert numbers.shape == view.shape and torch.equal(numbers, formula(view, scale))
        assert torch.equal(looked_up(view, torch.from_numpy(scale.values)), formula(view, scale))


def test_numbers_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        numbers = torch.tensor([[-1.0, 0.3, 200.0]], dtype=dtype)
        assert COLOUR.numbers(numbers) is numbers


def test_the_values_are_copied_to_a_device_once() -> None:
    levels = torch.empty(1, 3, 4, 5, dtype=torch.uint8, device="meta")
    scale = Scale(COLOUR.values)
    for _ in range(2):
        numbers = scale.numbers(levels)
        assert numbers.shape == levels.shape and numbers.dtype == torch.float32 and numbers.device.type == "meta"
    assert [device.type for device in scale._copies] == ["meta"]


def test_a_batch_on_its_device_holds_numbers() -> None:
    levels = EVERY[:, :, :, ::7]
    batch = Batch(["a", "b"], torch.ones(2), pixels=levels, masks=levels[:, :1], conditioning=levels.flip(-1))
    moved = batch.to(torch.device("cpu"))
    for found, expected in (
        (moved.pixels, formula(levels, COLOUR)),
        (moved.masks, formula(levels[:, :1], SHARE)),
        (moved.conditioning, formula(levels.flip(-1), COLOUR)),
    ):
        assert found is not None and torch.equal(found, expected)
