"""Are losses and masks the formulas that they are called?"""

from __future__ import annotations

import math

import pytest
import torch

from library.diffusion.loss import elementwise, masked, thresholds
from library.flags.objective import LossFlags

PREDICTION = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
TARGET = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
C = torch.tensor([0.5])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("l2", 4.0),
        ("l1", 2.0),
        ("huber", 2 * 0.5 * (math.sqrt(4.25) - 0.5)),
        ("smooth_l1", 2 * (math.sqrt(4.25) - 0.5)),
    ],
)
def test_a_difference_of_two_costs(loss_type: str, expected: float) -> None:
    assert elementwise(PREDICTION, TARGET, loss_type, C).flatten().tolist() == pytest.approx([expected, 0.0])


def test_an_unknown_loss_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match="--loss_type l3"):
        elementwise(PREDICTION, TARGET, "l3")


def test_thresholds_follow_their_schedule() -> None:
    t, sigmas = torch.tensor([0, 500, 1000]), torch.tensor([0.0, 1.0, torch.inf])

    def values(schedule: str) -> list[float]:
        return thresholds(LossFlags(huber_schedule=schedule, huber_c=0.25, huber_scale=2.0), t, sigmas).tolist()

    assert values("constant") == pytest.approx([0.5, 0.5, 0.5])
    assert values("exponential") == pytest.approx([2.0, 1.0, 0.5])
    assert values("snr") == pytest.approx([1.0, 0.75 / 4 + 0.25, 0.25])


def test_an_exponential_threshold_needs_a_positive_c() -> None:
    with pytest.raises(ValueError, match="--huber_c 0"):
        thresholds(LossFlags(huber_schedule="exponential", huber_c=0.0), torch.tensor([1]), torch.tensor([1.0]))


def test_masks_are_averaged_over_the_pixels_of_each_latent() -> None:
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :4] = 1.0  # half of the left latent's pixels
    assert masked(torch.full((1, 2, 1, 2), 10.0), mask).flatten().tolist() == [5.0, 0.0, 5.0, 0.0]
