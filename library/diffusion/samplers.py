"""From noise to latents: the samplers of `--sample_sampler`, by name, and the loop that runs them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from library.diffusion.ddpm import BETA_END, BETA_START, NUM_TIMESTEPS


class Scheduler(Protocol):
    """What the loop asks of a diffusers scheduler."""

    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the timesteps of a run."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as the model wants to see them."""
        ...

    step: Callable[..., Any]


def make_sampler(name: str, v_parameterization: bool = False, zero_terminal_snr: bool = False) -> Scheduler:
    """A new scheduler on the schedule that Stable Diffusion was trained with; it belongs to one picture.

    Raises ValueError for an unknown `name`, and for a sampler that cannot start from pure noise when
    `zero_terminal_snr` asks it to.
    """
    sampler = _SAMPLERS.get(name.removeprefix("k_")) if name in SAMPLER_NAMES else None
    if sampler is None:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLER_NAMES)}")
    if zero_terminal_snr and not sampler.zero_snr:
        able = ", ".join(other for other, entry in _SAMPLERS.items() if entry.zero_snr)
        raise ValueError(f"sampler {name!r} cannot be used with --zero_terminal_snr; choose one of {able}")
    options: dict[str, Any] = dict(sampler.options)
    if v_parameterization:
        options["prediction_type"] = "v_prediction"
    if zero_terminal_snr:
        options["rescale_betas_zero_snr"] = True
    with warnings.catch_warnings():
        # diffusers announces the end of "dpmsolver" to whoever builds it; there is nothing a user could do about it.
        warnings.simplefilter("ignore", FutureWarning)
        return sampler.build(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="scaled_linear",
            **options,
        )


def denoise(
    scheduler: Scheduler,
    steps: int,
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] of finished pictures from `latents`, noise of unit variance.

    `model` takes x [B, C, h, w] of the dtype of `latents` and t [B], and gives its raw prediction. Between the steps
    the pictures are float32, as half precision would lose the small steps. `generator`, or a list of one per
    picture, feeds the samplers that add noise on the way; it may live on the CPU whatever the device of the latents.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    x = latents.float() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep).to(latents.dtype)
        raw = model(seen, timestep.to(x.device).expand(len(x)))
        x = scheduler.step(raw.to(x.dtype), timestep, x, return_dict=False, **extra)[0]
    return x


class _PNDM(PNDMScheduler):
    """Pseudo numerical methods, started with Runge-Kutta steps that take four timesteps."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the timesteps of a run; ValueError for fewer than 4."""
        if num_inference_steps < 4:
            raise ValueError(f"sampler 'pndm' needs at least 4 steps, got {num_inference_steps}")
        super().set_timesteps(num_inference_steps, device)


class _LMS(LMSDiscreteScheduler):
    """Linear multistep whose coefficients are integrated exactly, so that scipy is not needed.

    The integrand is a polynomial of degree below `order` (at most 4), for which two Gauss points are enough.
    """

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the derivative `current_order` steps back, for the step after sigma number `t`."""
        sigmas = [float(sigma) for sigma in self.sigmas]
        points, weights = np.polynomial.legendre.leggauss(2)
        start, end = sigmas[t], sigmas[t + 1]
        total = 0.0
        for point, weight in zip(points, weights, strict=True):
            sigma = (start + end) / 2 + (end - start) / 2 * point
            value = 1.0
            for k in range(order):
                if k != current_order:
                    value *= (sigma - sigmas[t - k]) / (sigmas[t - current_order] - sigmas[t - k])
            total += weight * value
        return float(total * (end - start) / 2)


@dataclass(frozen=True)
class _Sampler:
    build: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=lambda: {"steps_offset": 1})
    zero_snr: bool = False
    """Whether it can start from pure noise."""


_SAMPLERS: Mapping[str, _Sampler] = {
    "ddim": _Sampler(DDIMScheduler, {"steps_offset": 1, "clip_sample": False}, zero_snr=True),
    "pndm": _Sampler(_PNDM),
    "lms": _Sampler(_LMS),
    "euler": _Sampler(EulerDiscreteScheduler, zero_snr=True),
    "euler_a": _Sampler(EulerAncestralDiscreteScheduler, zero_snr=True),
    "heun": _Sampler(HeunDiscreteScheduler),
    "dpm_2": _Sampler(KDPM2DiscreteScheduler),
    "dpm_2_a": _Sampler(KDPM2AncestralDiscreteScheduler),
    # diffusers refuses "dpmsolver" with its default last sigma of 0.
    "dpmsolver": _Sampler(
        DPMSolverMultistepScheduler,
        {"steps_offset": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        zero_snr=True,
    ),
    "dpmsolver++": _Sampler(
        DPMSolverMultistepScheduler, {"steps_offset": 1, "algorithm_type": "dpmsolver++"}, zero_snr=True
    ),
    "dpmsingle": _Sampler(DPMSolverSinglestepScheduler, {"lower_order_final": True}),
}

SAMPLER_NAMES = (*_SAMPLERS, "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a")
"""The choices of --sample_sampler; `k_` names the same sampler."""
