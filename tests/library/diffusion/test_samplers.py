"""Do the samplers find the image when the model knows it?"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from library.diffusion.ddpm import DDPM
from library.diffusion.guidance import guided
from library.diffusion.samplers import SAMPLER_NAMES, denoise, make_sampler
from library.flags.objective import LossFlags, NoiseFlags

KEPT = DDPM(NoiseFlags(), LossFlags(), False).alphas_cumprod
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def knowing(image: Tensor, v_parameterization: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A model that knows `image`, so that it always answers with the noise or velocity that is right."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        # Samplers of the Euler kind ask between two timesteps; log sigma is interpolated as they do.
        log_sigmas = ((1 - KEPT) / KEPT).sqrt().log()
        low = t.float().floor().long().clamp(0, 998)
        share = t.float() - low
        sigma = (log_sigmas[low] * (1 - share) + log_sigmas[low + 1] * share).exp().view(-1, 1, 1, 1)
        signal, noise_scale = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        noise = (x - signal * image) / noise_scale
        return signal * noise - noise_scale * image if v_parameterization else noise

    return model


@pytest.mark.parametrize("v_parameterization", [False, True])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_model_that_knows_the_image_leads_every_sampler_to_it(name: str, v_parameterization: bool) -> None:
    sampler = make_sampler(name, v_parameterization)
    found = denoise(sampler, 12, knowing(IMAGE, v_parameterization), NOISE, torch.Generator().manual_seed(2))
    # Some stop one small step before the end, where a little noise is left.
    assert (found - IMAGE).abs().max().item() < 0.15


def test_ddim_takes_the_steps_of_its_formula() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x.sin() + t.view(-1, 1, 1, 1) / 1000

    x = NOISE
    for t in range(801, 0, -200):  # 5 steps, offset by 1
        kept, next_kept = KEPT[t].item(), KEPT[t - 200].item() if t > 200 else 1.0
        noise = model(x, torch.tensor([t]))
        image = (x - math.sqrt(1 - kept) * noise) / math.sqrt(kept)
        x = math.sqrt(next_kept) * image + math.sqrt(1 - next_kept) * noise
    torch.testing.assert_close(denoise(make_sampler("ddim"), 5, model, NOISE), x, atol=1e-5, rtol=1e-5)


def test_euler_takes_the_steps_of_its_formula() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x.sin() + t.view(-1, 1, 1, 1) / 1000

    table = ((1 - KEPT) / KEPT).sqrt()
    timesteps = [999.0, 666.0, 333.0, 0.0]
    sigmas = [table[int(t)].item() for t in timesteps] + [0.0]
    x = NOISE * sigmas[0]
    for t, sigma, next_sigma in zip(timesteps, sigmas, sigmas[1:]):
        x = x + (next_sigma - sigma) * model(x / math.sqrt(1 + sigma**2), torch.tensor([t]))
    torch.testing.assert_close(denoise(make_sampler("euler"), 4, model, NOISE), x, atol=1e-4, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x.sin()

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = denoise(make_sampler("euler_a"), 5, model, torch.cat([NOISE, IMAGE]), generators(7, 8))
    alone = denoise(make_sampler("euler_a"), 5, model, IMAGE, generators(8))
    torch.testing.assert_close(both[1:], alone)


def test_half_precision_is_only_for_the_model() -> None:
    seen: list[torch.dtype] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return knowing(IMAGE, False)(x.float(), t).to(x.dtype)

    found = denoise(make_sampler("ddim"), 40, model, NOISE.bfloat16())
    assert set(seen) == {torch.bfloat16} and found.dtype == torch.float32
    torch.testing.assert_close(found, IMAGE, atol=0.02, rtol=0.02)


def test_pure_noise_is_only_for_samplers_that_can_start_from_it() -> None:
    with pytest.raises(ValueError, match="'heun' cannot be used with --zero_terminal_snr; choose one of ddim, euler"):
        make_sampler("heun", True, True)
    found = denoise(make_sampler("ddim", True, True), 4, lambda x, t: -IMAGE * (t > 900), NOISE)
    assert found.isfinite().all()


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'k_ddim' is unknown; choose one of ddim, pndm"):
        make_sampler("k_ddim")


def test_pndm_says_how_many_steps_it_needs() -> None:
    with pytest.raises(ValueError, match="at least 4 steps, got 3"):
        denoise(make_sampler("pndm"), 3, lambda x, t: x, NOISE)


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name != "pndm"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_enough(name: str, steps: int) -> None:
    found = denoise(make_sampler(name), steps, lambda x, t: 0.5 * x, NOISE, torch.Generator().manual_seed(0))
    assert found.isfinite().all()


def test_guidance_of_scale_one_is_the_answer_with_the_prompt() -> None:
    torch.testing.assert_close(guided(IMAGE, NOISE, 1.0), IMAGE)
    assert torch.equal(guided(IMAGE, NOISE, 0.0), NOISE)
    torch.testing.assert_close(guided(torch.ones(1), torch.zeros(1), 7.5), torch.tensor([7.5]))
