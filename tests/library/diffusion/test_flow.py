"""Does flow matching noise, aim and weigh as FLUX is trained?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from library.diffusion.flow import FlowMatching, log_shift, loss_weights, shifted, tokens_of
from library.diffusion.process import Draws, Noised
from library.flags.flow import FlowFlags, WeightingFlags
from library.flags.objective import LossFlags, NoiseFlags

LATENTS = torch.linspace(-1, 1, 2 * 4 * 4 * 6).reshape(2, 4, 4, 6)
MANY = torch.zeros(4000, 1, 64, 64)


def process(
    sampling: str = "sigmoid",
    *,
    prediction: str = "raw",
    noise: NoiseFlags | None = None,
    loss: LossFlags | None = None,
    weighting: str = "uniform",
    dtype: torch.dtype = torch.float32,
    shift: float = 3.0,
) -> FlowMatching:
    flow = FlowFlags(sampling, model_prediction_type=prediction, discrete_flow_shift=shift)
    return FlowMatching(noise or NoiseFlags(), loss or LossFlags(), flow, WeightingFlags(weighting), dtype)


def at(sigma: float) -> Noised:
    x = torch.full((1, 1, 1, 1), 2.0)
    return Noised(x, torch.tensor([1000 * sigma]), torch.zeros_like(x), torch.full((1, 1, 1, 1), sigma))


def middle(sampling: str, size: int = 64, shift: float = 3.0, weighting: str = "uniform") -> float:
    """The median of the sigmas drawn for a square picture of `size` latents."""
    drawn = process(sampling, shift=shift, weighting=weighting).draw_sigmas(4000, (size // 2) ** 2, Draws.seeded(0))
    return float(drawn.median())


def test_latents_and_noise_are_mixed_in_shares_that_add_up_to_one() -> None:
    noised = process().add_noise(LATENTS, Draws.seeded(1), t=250)
    torch.testing.assert_close(noised.x, 0.75 * LATENTS + 0.25 * noised.noise)
    assert noised.t.tolist() == [250, 250]
    assert noised.sigmas is not None and noised.sigmas.shape == (2, 1, 1, 1)


def test_going_along_the_target_from_the_noised_latents_leads_to_the_image() -> None:
    flow = process()
    noised = flow.add_noise(LATENTS, Draws.seeded(1), t=700)
    torch.testing.assert_close(noised.x - 0.7 * flow.target(LATENTS, noised), LATENTS)


def test_the_target_may_be_written_to() -> None:
    flow = process()
    noised = flow.add_noise(LATENTS, Draws.seeded(1))
    before = noised.noise.clone()
    flow.target(LATENTS, noised).zero_()
    assert torch.equal(noised.noise, before)


@pytest.mark.parametrize(("prediction", "expected"), [("raw", 4.0), ("additive", 6.0), ("sigma_scaled", 1.0)])
def test_the_answer_is_taken_for_what_the_flag_says(prediction: str, expected: float) -> None:
    answer = torch.full((1, 1, 1, 1), 4.0)
    assert process(prediction=prediction).prediction(answer, at(0.25)).item() == expected


def test_equal_seeds_give_equal_noise_and_levels_and_others_do_not() -> None:
    flow = process("flux_shift")
    first, second, other = (flow.add_noise(LATENTS, Draws.seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.x, second.x) and torch.equal(first.t, second.t)
    assert not torch.equal(first.x, other.x)


def test_nothing_is_drawn_from_the_global_streams() -> None:
    noise = NoiseFlags(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    before = torch.get_rng_state()
    for sampling in ("sigma", "uniform", "flux_shift"):
        process(sampling, noise=noise, weighting="logit_normal").add_noise(LATENTS, Draws.seeded(1))
    assert torch.equal(before, torch.get_rng_state())


def test_the_draws_tell_the_timesteps_for_the_log() -> None:
    draws = Draws.seeded(2)
    noised = process("shift").add_noise(LATENTS, draws)
    assert torch.equal(draws.drawn[0], noised.t) and 0 < float(noised.t.min()) < float(noised.t.max()) < 1000


def test_timesteps_are_rounded_to_the_weights_and_sigmas_are_not() -> None:
    exact = process("shift").add_noise(LATENTS, Draws.seeded(3))
    rounded = process("shift", dtype=torch.bfloat16).add_noise(LATENTS, Draws.seeded(3))
    assert torch.equal(rounded.t, exact.t.bfloat16()) and torch.equal(rounded.x, exact.x.bfloat16())
    assert exact.sigmas is not None and rounded.sigmas is not None
    assert torch.equal(rounded.sigmas, exact.sigmas) and rounded.sigmas.dtype == torch.float32


def test_sigmas_of_the_schedule_are_rounded_too() -> None:
    exact = process("sigma").add_noise(LATENTS, Draws.seeded(3))
    rounded = process("sigma", dtype=torch.bfloat16).add_noise(LATENTS, Draws.seeded(3))
    assert exact.sigmas is not None and rounded.sigmas is not None
    assert torch.equal(rounded.sigmas, exact.sigmas.bfloat16().float())


def test_half_of_the_levels_lie_above_the_value_that_the_shift_says() -> None:
    assert middle("uniform") == pytest.approx(0.5, abs=0.02)
    assert middle("sigmoid") == pytest.approx(0.5, abs=0.02)
    assert middle("shift", shift=3.0) == pytest.approx(0.75, abs=0.02)
    assert middle("sigma", shift=3.0) == pytest.approx(0.75, abs=0.02)
    assert middle("sigma", shift=1.0) == pytest.approx(0.5, abs=0.02)
    for size, log in ((32, 0.5), (128, 1.15)):
        assert middle("flux_shift", size) == pytest.approx(1 / (1 + math.exp(-log)), abs=0.02)


def test_a_larger_image_is_trained_with_more_noise_under_flux_shift_only() -> None:
    assert middle("flux_shift", 128) > middle("flux_shift", 32) + 0.1
    assert middle("shift", 128) == middle("shift", 32)


def test_logit_normal_and_mode_prefer_the_middle_of_an_unshifted_schedule() -> None:
    def share(weighting: str) -> float:
        drawn = process("sigma", shift=1.0, weighting=weighting).draw_sigmas(4000, 256, Draws.seeded(0))
        return float(((drawn > 0.25) & (drawn < 0.75)).float().mean())

    assert share("uniform") == pytest.approx(0.5, abs=0.03)
    assert share("logit_normal") > 0.65 and share("mode") > 0.6
    assert share("cosmap") == share("none") == share("sigma_sqrt") == share("uniform")


def test_limits_of_timesteps_squeeze_the_distribution_between_them() -> None:
    limits = NoiseFlags(min_timestep=200, max_timestep=600)
    whole = process("shift").draw_sigmas(500, 256, Draws.seeded(0))
    part = process("shift", noise=limits).draw_sigmas(500, 256, Draws.seeded(0))
    torch.testing.assert_close(part, 0.2 + 0.4 * whole)


def test_limits_that_leave_no_level_are_refused() -> None:
    with pytest.raises(ValueError, match="--min_timestep 800 and --max_timestep 300"):
        process(noise=NoiseFlags(min_timestep=800, max_timestep=300))


@pytest.mark.parametrize(("scheme", "expected"), [("sigma_sqrt", 16.0), ("cosmap", 1.6 / math.pi * 2), ("none", 1.0)])
def test_only_sigma_scaled_answers_are_weighed(scheme: str, expected: float) -> None:
    one = torch.ones(1)
    assert process(prediction="sigma_scaled", weighting=scheme).weigh(one, at(0.25)).item() == pytest.approx(expected)
    assert process(prediction="raw", weighting=scheme).weigh(one, at(0.25)).item() == 1.0


def test_the_weight_of_an_image_without_noise_is_finite() -> None:
    weights = loss_weights("sigma_sqrt", torch.tensor([0.0, 0.001]))
    assert weights is not None and weights.tolist() == pytest.approx([1e6, 1e6])


@pytest.mark.parametrize("schedule", ["snr", "constant", "exponential"])
def test_huber_loss_is_finite_at_both_ends(schedule: str) -> None:
    flow = process(loss=LossFlags(loss_type="huber", huber_schedule=schedule))
    answer, target = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)
    for sigma in (0.0, 0.5, 1.0):
        assert 0 < flow.elementwise_loss(answer, target, at(sigma)).item() < 9


def test_the_huber_threshold_of_snr_falls_from_one_to_huber_c_as_noise_grows() -> None:
    flow = process(loss=LossFlags(loss_type="smooth_l1", huber_schedule="snr", huber_c=0.1))
    tiny, zero = torch.full((1, 1, 1, 1), 1e-2), torch.zeros(1, 1, 1, 1)
    # Far below its threshold c, the loss is d^2 / c.
    found = [1e-4 / flow.elementwise_loss(tiny, zero, at(sigma)).item() for sigma in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([1.0, 0.9 * 0.25 + 0.1, 0.1], rel=0.01)


def test_extra_noise_of_the_input_is_not_part_of_the_target() -> None:
    plain = process().add_noise(LATENTS, Draws.seeded(5), t=500)
    extra = process(noise=NoiseFlags(ip_noise_gamma=0.3)).add_noise(LATENTS, Draws.seeded(5), t=500)
    assert torch.equal(plain.noise, extra.noise)
    assert float((extra.x - plain.x).std()) == pytest.approx(0.15, rel=0.2)


def test_the_shift_keeps_the_ends_and_one_shifts_nothing() -> None:
    sigmas = torch.linspace(0, 1, 5)
    assert torch.equal(shifted(sigmas, 1.0), sigmas)
    assert shifted(sigmas, 3.0).tolist() == pytest.approx([0, 0.5, 0.75, 0.9, 1.0])


def test_the_shift_by_size_is_linear_in_the_tokens_also_outside() -> None:
    assert [log_shift(n) for n in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert log_shift(7936) == pytest.approx(1.8)
    assert tokens_of(torch.zeros(1, 16, 128, 96)) == 64 * 48


def test_rows_keep_their_sigmas() -> None:
    noised = process().add_noise(LATENTS, Draws.seeded(1))
    part = replace(noised).rows([1])
    assert noised.sigmas is not None and part.sigmas is not None
    assert torch.equal(part.sigmas, noised.sigmas[1:])
