"""Every sampler's run with an analytic model in place of a denoiser."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_ancestral
from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete as dpm2_ancestral
from torch import Tensor

from library.diffusion.samplers import denoise, make_sampler


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    outputs = {}
    for name, row in case["table"].items():
        if "error" in row:
            continue
        sampler, prediction, *rest = name.split(".")
        scheduler = make_sampler(sampler, prediction == "v", "zsnr" in rest)
        states = trajectory(case, recipe, scheduler, row["steps"])
        outputs[f"{name}.final"] = states[-1]
        if f"{name}.steps" in case["outputs"]:
            outputs[f"{name}.steps"] = torch.stack(states)
    return outputs


def trajectory(case: dict[str, Any], recipe: ModuleType, scheduler: Any, steps: int) -> list[Tensor]:
    """The latents after each step; the k-th noise that the scheduler draws is the recorded one."""

    def tensor(name: str) -> Tensor:
        return recipe.tensor(name, tuple(case["inputs"][name]["shape"]), case["seed"])

    bias, context = tensor("bias"), tensor("cond").mean(dim=(1, 2)).view(-1, 1, 1, 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x.tanh() * (0.2 + 0.8 * t.view(-1, 1, 1, 1) / 1000) + 0.1 * bias + 0.05 * context

    num_drawn = 0

    def recorded_noise(shape: tuple[int, ...], **_: Any) -> Tensor:
        nonlocal num_drawn
        num_drawn += 1
        return recipe.tensor(f"noise_{num_drawn - 1}", tuple(shape), case["seed"])

    states: list[Tensor] = []
    step = scheduler.step

    def recording_step(*args: Any, generator: Any = None, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        states.append(result[0])
        return result

    scheduler.step = recording_step
    with (
        patch.object(euler_ancestral, "randn_tensor", recorded_noise),
        patch.object(dpm2_ancestral, "randn_tensor", recorded_noise),
    ):
        final = denoise(scheduler, steps, model, tensor("latents"))
    assert torch.equal(final, states[-1])
    return states
