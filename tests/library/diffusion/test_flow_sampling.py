"""Does the loop of flow models lead from noise to the picture?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.diffusion.flow_sampling import integrate, sampling_schedule


def test_the_schedule_runs_from_noise_to_picture_and_a_shift_lingers_at_noise() -> None:
    assert sampling_schedule(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampling_schedule(4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def test_with_the_true_velocity_any_number_of_steps_gives_the_picture() -> None:
    noise, picture = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    for steps in (1, 7):
        found = integrate(lambda x, t: noise - picture, sampling_schedule(steps, 2.0), noise)
        torch.testing.assert_close(found, picture)


def test_the_model_is_asked_at_every_level_but_the_last() -> None:
    asked: list[list[float]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.tolist())
        return torch.zeros_like(x)

    integrate(model, sampling_schedule(4), torch.zeros(2, 1, 1, 1))
    assert asked == [[1000, 1000], [750, 750], [500, 500], [250, 250]]


def test_small_steps_of_a_model_in_half_precision_are_not_lost() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bfloat16)

    found = integrate(model, sampling_schedule(1000), torch.full((1, 1, 1, 1), 100.0))
    assert found.item() == pytest.approx(99.0, abs=1e-3)  # bfloat16 steps of 0.001 from 100 would go nowhere
