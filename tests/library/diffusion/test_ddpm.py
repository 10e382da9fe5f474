"""Does the DDPM process noise, aim and weigh as Stable Diffusion is trained?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from library.diffusion.ddpm import DDPM
from library.diffusion.loss import masked
from library.diffusion.process import Draws, Noised
from library.flags.objective import LossFlags, NoiseFlags

LATENTS = torch.linspace(-1, 1, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4)
ZERO = NoiseFlags(zero_terminal_snr=True)


def at(timesteps: list[int]) -> Noised:
    t = torch.tensor(timesteps)
    return Noised(torch.zeros(len(t), 4, 4, 4), t, torch.zeros(len(t), 4, 4, 4))


def weights(process: DDPM, timesteps: list[int]) -> list[float]:
    return process.weigh(torch.ones(len(timesteps)), at(timesteps)).tolist()


def test_the_schedule_has_the_known_first_and_last_values() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    assert process.betas[0].item() == pytest.approx(0.00085, rel=1e-5)
    assert process.betas[-1].item() == pytest.approx(0.012, rel=1e-5)
    assert process.alphas_cumprod[-1].item() == pytest.approx(0.0046601, rel=1e-3)


def test_variance_of_signal_and_noise_add_up_to_one() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    noised = process.add_noise(LATENTS, Draws.seeded(1), t=250)
    kept = process.alphas_cumprod[250].item()
    expected = math.sqrt(kept) * LATENTS + math.sqrt(1 - kept) * noised.noise
    torch.testing.assert_close(noised.x, expected)
    assert noised.t.tolist() == [250, 250]


def test_image_and_noise_can_be_computed_back_from_the_velocity() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), True)
    noised = process.add_noise(LATENTS, Draws.seeded(1), t=700)
    velocity = process.target(LATENTS, noised)
    kept = process.alphas_cumprod[700].item()
    torch.testing.assert_close(math.sqrt(kept) * noised.x - math.sqrt(1 - kept) * velocity, LATENTS)
    torch.testing.assert_close(math.sqrt(1 - kept) * noised.x + math.sqrt(kept) * velocity, noised.noise)


def test_equal_seeds_give_equal_noise_and_timesteps_and_others_do_not() -> None:
    process = DDPM(NoiseFlags(multires_noise_iterations=4), LossFlags(), False)
    first, second, other = (process.add_noise(LATENTS, Draws.seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.x, second.x) and torch.equal(first.t, second.t)
    assert not torch.equal(first.x, other.x)


def test_nothing_is_drawn_from_the_global_streams() -> None:
    flags = NoiseFlags(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        multires_noise_iterations=3,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    before = torch.get_rng_state()
    DDPM(flags, LossFlags(), False).add_noise(LATENTS, Draws.seeded(1))
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_stay_below_the_maximum_and_reach_both_ends() -> None:
    process = DDPM(NoiseFlags(min_timestep=10, max_timestep=13), LossFlags(), False)
    drawn = process.add_noise(torch.zeros(200, 4, 1, 1), Draws.seeded(0)).t
    assert set(drawn.tolist()) == {10, 11, 12}


def test_crossed_timesteps_mean_the_maximum() -> None:
    process = DDPM(NoiseFlags(min_timestep=700, max_timestep=600), LossFlags(), False)
    assert process.add_noise(LATENTS, Draws.seeded(0)).t.tolist() == [600, 600]


@pytest.mark.parametrize(("low", "high"), [(-1, None), (0, 1001), (1000, 1000)])
def test_timesteps_off_the_schedule_are_refused(low: int | None, high: int | None) -> None:
    with pytest.raises(ValueError, match="--min_timestep"):
        DDPM(NoiseFlags(min_timestep=low, max_timestep=high), LossFlags(), False)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    plain, zero = DDPM(NoiseFlags(), LossFlags(), True), DDPM(ZERO, LossFlags(), True)
    assert zero.alphas_cumprod[-1].item() == 0.0
    assert zero.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)
    noised = zero.add_noise(LATENTS, Draws.seeded(1), t=999)
    assert torch.equal(noised.x, noised.noise)
    assert torch.equal(zero.target(LATENTS, noised), -LATENTS)


def test_weights_follow_the_schedule_in_use() -> None:
    loss = LossFlags(min_snr_gamma=5.0)
    zero = DDPM(ZERO, loss, True)
    snr = zero.snr[500].item()
    assert snr != pytest.approx(DDPM(NoiseFlags(), loss, True).snr[500].item(), rel=1e-2)
    assert weights(zero, [500, 999]) == pytest.approx([min(snr, 5.0) / (snr + 1), 0.0])


def test_without_weightings_a_loss_keeps_its_value() -> None:
    assert weights(DDPM(NoiseFlags(), LossFlags(), False), [0, 999]) == [1.0, 1.0]


def test_min_snr_of_noise_prediction_is_one_where_nothing_is_left_of_the_image() -> None:
    assert weights(DDPM(ZERO, LossFlags(min_snr_gamma=5.0), False), [998, 999]) == [1.0, 1.0]


@pytest.mark.parametrize("loss", [LossFlags(debiased_estimation_loss=True), LossFlags(v_pred_like_loss=0.5)])
def test_growing_weights_stop_at_the_last_step_of_the_plain_schedule(loss: LossFlags) -> None:
    largest = weights(DDPM(NoiseFlags(), loss, False), [999])[0]
    assert weights(DDPM(ZERO, loss, False), [998, 999]) == pytest.approx([largest, largest])


def test_losses_in_half_precision_are_taken_in_float32() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    raw = torch.full((1, 4, 4, 4), 300.0, dtype=torch.float16)
    prediction = process.prediction(raw, at([5]))
    loss = process.elementwise_loss(prediction, torch.zeros(1, 4, 4, 4), at([5]))
    assert loss.dtype == torch.float32
    assert loss[0, 0, 0, 0].item() == 90000.0  # more than a float16 holds


def test_the_target_may_be_written_to() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    noised = process.add_noise(LATENTS, Draws.seeded(1), t=1)
    process.target(LATENTS, noised).zero_()
    assert noised.noise.abs().sum().item() > 0


def test_latents_in_half_precision_come_back_in_it() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    noised = process.add_noise(LATENTS.bfloat16(), Draws.seeded(1), t=1)
    assert noised.x.dtype == torch.bfloat16 and noised.noise.dtype == torch.float32


def test_infinite_noise_to_signal_leaves_a_finite_huber_loss() -> None:
    process = DDPM(ZERO, LossFlags(loss_type="huber", huber_schedule="snr"), True)
    loss = process.elementwise_loss(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), at([999]))
    assert loss[0, 0, 0, 0].item() == pytest.approx(2 * 0.1 * (math.sqrt(1 + 0.01) - 0.1), rel=1e-5)


class ScalarReads(TorchDispatchMode):
    """Counts the places where the host would wait for a number of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_number_back_from_the_device() -> None:
    flags = NoiseFlags(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=3,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    process = DDPM(flags, LossFlags(loss_type="huber", min_snr_gamma=5.0), True)
    with ScalarReads() as reads:
        noised = process.add_noise(LATENTS, Draws.seeded(1))
        target = process.target(LATENTS, noised)
        loss = process.elementwise_loss(process.prediction(noised.x, noised), target, noised)
        process.weigh(masked(loss, torch.ones(2, 1, 32, 32)).mean(dim=(1, 2, 3)), noised)
        assert reads.count == 0
        loss.max().item()
    assert reads.count == 1


@pytest.mark.gpu
def test_a_step_on_the_device_never_waits_for_it() -> None:
    flags = NoiseFlags(noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=3)
    process = DDPM(flags, LossFlags(loss_type="huber", min_snr_gamma=5.0), True)
    latents = LATENTS.cuda()
    draws = Draws.seeded(1, "cuda")
    for mode in ("default", "error"):  # the first round puts the tables on the device
        torch.cuda.set_sync_debug_mode(mode)
        try:
            noised = process.add_noise(latents, draws)
            target = process.target(latents, noised)
            loss = process.elementwise_loss(process.prediction(noised.x, noised), target, noised)
            weighed = process.weigh(loss.mean(dim=(1, 2, 3)), noised)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert weighed.isfinite().all()


@pytest.mark.gpu
def test_the_device_trains_on_the_timesteps_of_the_cpu() -> None:
    process = DDPM(NoiseFlags(), LossFlags(), False)
    first, second = (process.add_noise(LATENTS.cuda(), Draws.seeded(7, "cuda")) for _ in range(2))
    assert first.t.tolist() == torch.randint(0, 1000, (2,), generator=torch.Generator().manual_seed(7)).tolist()
    assert torch.equal(first.x, second.x)
