"""Is each noise option what it says?"""

from __future__ import annotations

import pytest
import torch

from library.diffusion.noise import draw_noise, perturb
from library.diffusion.process import Draws
from library.flags.objective import NoiseFlags

LATENTS = torch.zeros(3, 4, 32, 32)


def test_plain_noise_is_standard_normal() -> None:
    noise = draw_noise(LATENTS, NoiseFlags(), Draws.seeded(0))
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)


def test_an_offset_is_one_number_for_each_image_and_channel() -> None:
    plain = draw_noise(LATENTS, NoiseFlags(), Draws.seeded(0))
    shift = draw_noise(LATENTS, NoiseFlags(noise_offset=0.5), Draws.seeded(0)) - plain
    assert shift.std(dim=(2, 3)).max().item() < 1e-6
    assert len(shift[:, :, 0, 0].unique()) == 12


def test_an_offset_of_random_strength_is_smaller() -> None:
    plain = draw_noise(LATENTS, NoiseFlags(), Draws.seeded(0))
    flags = NoiseFlags(noise_offset=0.5, noise_offset_random_strength=True)
    shifts = draw_noise(LATENTS, flags, Draws.seeded(0)) - plain
    assert 0 < shifts.abs().max().item() < 0.5 * 4


def test_adaptive_noise_never_turns_the_offset_negative() -> None:
    bright = LATENTS + 100
    flags = NoiseFlags(noise_offset=0.5, adaptive_noise_scale=-1.0)
    assert torch.equal(draw_noise(bright, flags, Draws.seeded(0)), draw_noise(bright, NoiseFlags(), Draws.seeded(0)))


def test_multires_noise_has_unit_deviation_and_neighbours_that_resemble_each_other() -> None:
    def likeness(noise: torch.Tensor) -> float:
        return (noise[..., 1:] * noise[..., :-1]).mean().item()

    plain = draw_noise(LATENTS, NoiseFlags(), Draws.seeded(0))
    noise = draw_noise(LATENTS, NoiseFlags(multires_noise_iterations=6, multires_noise_discount=0.9), Draws.seeded(0))
    assert noise.std().item() == pytest.approx(1, abs=1e-5)
    assert abs(likeness(plain)) < 0.05 < likeness(noise)


def test_a_pyramid_ends_at_the_first_level_with_a_side_of_one() -> None:
    small = torch.zeros(1, 4, 2, 2)  # level 0 has 2 x 2, level 1 has 1 x 1
    draws = Draws.seeded(0)
    draw_noise(small, NoiseFlags(multires_noise_iterations=50), draws)
    expected = Draws.seeded(0)
    for size in (2, 2, 1):
        torch.randn(1, 4, size, size, generator=expected.noise)
    assert torch.equal(draws.noise.get_state(), expected.noise.get_state())


def test_extra_noise_of_the_input_leaves_the_noise_as_it_was() -> None:
    noise = torch.zeros(2, 4, 32, 32)
    extra = perturb(noise, NoiseFlags(ip_noise_gamma=0.1), Draws.seeded(0))
    assert noise.abs().max().item() == 0
    assert extra.std().item() == pytest.approx(0.1, rel=0.05)
    assert perturb(noise, NoiseFlags(), Draws.seeded(0)) is noise
