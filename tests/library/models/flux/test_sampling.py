"""Are pictures of FLUX made with the right size, noise, schedule and guidance?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.diffusion.flow import shifted
from library.models.architecture import Condition, ImageRequest
from library.models.flux.sampling import completed, denoised, packed_noise

NOISE = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
COND, UNCOND = (Condition({"txt": torch.full((1, 2, 3), value)}) for value in (1.0, -1.0))
REQUEST = ImageRequest("", steps=4, scale=1.0, guidance_scale=3.5)


class Recorder:
    """A model whose velocity is the mean of its text, everywhere."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float, list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.guidance is not None and len(t) == len(x) == len(cond.guidance)
        self.asked.append((len(x), t[0].item(), cond.guidance.tolist()))
        return cond.text["txt"].mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x)


def test_what_a_prompt_leaves_open_is_the_familys_own() -> None:
    request = completed(ImageRequest("a cat"))
    assert (request.width, request.height, request.steps) == (512, 512, 20)
    assert (request.scale, request.guidance_scale) == (1.0, 3.5)


@pytest.mark.parametrize(("asked", "made"), [(1024, 1024), (1000, 992), (15, 64), (64, 64)])
def test_sides_are_floored_to_16_pixels(asked: int, made: int) -> None:
    request = completed(ImageRequest("a cat", width=asked, height=asked))
    assert (request.width, request.height) == (made, made)


def test_zero_is_a_guidance_and_not_its_absence() -> None:
    request = completed(ImageRequest("a cat", guidance_scale=0.0, scale=0.0))
    assert (request.guidance_scale, request.scale) == (0.0, 0.0)


def test_noise_is_drawn_token_by_token_from_the_seed() -> None:
    drawn = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(5))
    noise = packed_noise(5, height=32, width=48, channels=16)
    assert noise.shape == (1, 16, 4, 6)
    # The second token of the second row: channel 3, lower left of its patch.
    assert noise[0, 3, 3, 2] == drawn[0, 4, 3 * 4 + 2]


def test_without_a_second_guidance_the_model_is_asked_once_a_step() -> None:
    model = Recorder()
    found = denoised(model, NOISE, COND, UNCOND, REQUEST)
    assert [rows for rows, _, _ in model.asked] == [1] * 4
    assert all(guidance == [3.5] for _, _, guidance in model.asked)
    torch.testing.assert_close(found, NOISE - 1.0)


def test_a_scale_pushes_from_the_negative_prompt_beyond_the_prompt() -> None:
    model = Recorder()
    found = denoised(model, NOISE, COND, UNCOND, replace(REQUEST, scale=2.0))
    assert [rows for rows, _, _ in model.asked] == [2] * 4
    torch.testing.assert_close(found, NOISE - 3.0)  # -1 + 2 * (1 - -1)
    weaker = denoised(model, NOISE, COND, UNCOND, replace(REQUEST, scale=0.5))
    torch.testing.assert_close(weaker, NOISE)


def test_without_a_negative_prompt_there_is_nothing_to_push_from() -> None:
    model = Recorder()
    denoised(model, NOISE, COND, None, replace(REQUEST, scale=2.0))
    assert [rows for rows, _, _ in model.asked] == [1] * 4


def test_the_schedule_is_shifted_by_the_size_of_the_picture_or_as_told() -> None:
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    by_size = math.exp(0.5 + (6 - 256) * 0.65 / 3840)  # 2 x 3 tokens
    for extras, shift in (({}, by_size), ({"flow_shift": 1.0}, 1.0), ({"flow_shift": 4.0}, 4.0)):
        model = Recorder()
        denoised(model, NOISE, COND, None, replace(REQUEST, extras=extras))
        asked = [t for _, t, _ in model.asked]
        assert asked == pytest.approx((1000 * shifted(even, shift)).tolist(), rel=1e-5)
