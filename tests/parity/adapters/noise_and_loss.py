"""The schedule, noise options, targets, losses and weights of Stable Diffusion training."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.diffusion.ddpm import DDPM
from library.diffusion.loss import masked, thresholds
from library.diffusion.process import Draws, Noised
from library.flags.objective import LossFlags, NoiseFlags


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    inputs = Inputs(case, recipe)
    return schedules() | noises(case["config"], inputs) | weights(case["config"], inputs) | losses(case, inputs)


class Inputs:
    def __init__(self, case: dict[str, Any], recipe: ModuleType) -> None:
        def tensor(name: str) -> Tensor:
            return recipe.tensor(name, tuple(case["inputs"][name]["shape"]), case["seed"])

        def value(name: str) -> Tensor:
            return torch.tensor(case["inputs"][name]["value"])

        self.latents = 0.5 * tensor("latents") + tensor("latent_bias")
        self.pred, self.target = tensor("pred"), tensor("target")
        self.mask = (0.25 * tensor("mask") + 0.5).clamp(0, 1)
        self.weight_timesteps = value("weight_timesteps")
        self.loss_timesteps = value("loss_timesteps")
        self.curve_timesteps = value("curve_timesteps")

    def noised(self, timesteps: Tensor) -> Noised:
        return Noised(self.latents, timesteps, self.latents)


def schedules() -> dict[str, Tensor]:
    plain = DDPM(NoiseFlags(), LossFlags(), False)
    zero = DDPM(NoiseFlags(zero_terminal_snr=True), LossFlags(), True)
    return {
        "betas": plain.betas,
        "alphas_cumprod": plain.alphas_cumprod,
        "all_snr": plain.snr,
        "betas_zero_snr": zero.betas,
        "alphas_cumprod_zero_snr": zero.alphas_cumprod,
        # Recorded from before the rescaling, a mistake: the SNR that weighs our losses is that of the schedule in
        # use (tests/library/diffusion/test_ddpm.py). What is comparable is the plain schedule's.
        "all_snr_zero_snr": plain.snr,
    }


def noises(config: dict[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    outputs = {}
    for name, flags in config["noise_variants"].items():
        process = DDPM(NoiseFlags(**flags), LossFlags(), True)
        noised = process.add_noise(inputs.latents, Draws.seeded(config["manual_seed"]))
        outputs |= {f"noise_{name}": noised.noise, f"noisy_{name}": noised.x, f"t_{name}": noised.t}
    for suffix, is_zero in (("", False), ("_zero_snr", True)):
        process = DDPM(NoiseFlags(zero_terminal_snr=is_zero), LossFlags(), True)
        noised = process.add_noise(inputs.latents, Draws.seeded(config["manual_seed"]))
        outputs[f"noisy_plain{suffix}"] = noised.x
        outputs[f"velocity_plain{suffix}"] = process.target(inputs.latents, noised)
    return outputs


def weights(config: dict[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    outputs = {}
    ones = torch.ones(len(inputs.weight_timesteps))
    for name, flags in config["weight_variants"].items():
        loss = LossFlags(**{key: value for key, value in flags.items() if key != "v_parameterization"})
        process = DDPM(NoiseFlags(), loss, flags.get("v_parameterization", False))
        outputs[f"weight_{name}"] = process.weigh(ones, inputs.noised(inputs.weight_timesteps))
    return outputs


def losses(case: dict[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    outputs = {}

    def elements(flags: LossFlags) -> Tensor:
        process = DDPM(NoiseFlags(), flags, False)
        return process.elementwise_loss(inputs.pred, inputs.target, inputs.noised(inputs.loss_timesteps))

    for loss_type in ("l1", "l2"):
        outputs[f"loss_{loss_type}"] = elements(LossFlags(loss_type=loss_type)).mean(dim=(1, 2, 3))
    for schedule in ("constant", "exponential", "snr"):
        for c, scale in ((0.1, 1.0), (0.3, 2.0)):
            name = f"{schedule}_c{c}_s{scale}"
            for loss_type in ("huber", "smooth_l1"):
                flags = LossFlags(loss_type=loss_type, huber_schedule=schedule, huber_c=c, huber_scale=scale)
                outputs[f"loss_{loss_type}_{name}"] = elements(flags).mean(dim=(1, 2, 3))
            outputs[f"huber_c_{name}"] = thresholds_at(inputs.loss_timesteps, flags)
    for schedule in ("exponential", "snr"):
        outputs[f"huber_c_curve_{schedule}"] = thresholds_at(inputs.curve_timesteps, LossFlags(huber_schedule=schedule))
    # Masks of either origin reach the loss in one form, [B, 1, H, W] in 0..1.
    shrunk = masked(elements(LossFlags()), inputs.mask[:, None]).mean(dim=(1, 2, 3))
    return outputs | {"loss_l2_alpha_masked": shrunk, "loss_l2_cond_masked": shrunk}


def thresholds_at(t: Tensor, flags: LossFlags) -> Tensor:
    kept = DDPM(NoiseFlags(), LossFlags(), False).alphas_cumprod[t]
    return thresholds(flags, t, ((1 - kept) / kept).sqrt())
