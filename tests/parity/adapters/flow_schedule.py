"""Noise levels, predictions and weights of flow training, and the schedules of flow sampling."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.diffusion.flow import FlowMatching, draw_positions, log_shift, loss_weights
from library.diffusion.flow_sampling import sampling_schedule
from library.diffusion.process import Draws, Noised
from library.flags.flow import FlowFlags, WeightingFlags
from library.flags.objective import LossFlags, NoiseFlags

SCHEMES = ("uniform", "none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    return noised(case, recipe) | predictions(case, recipe) | weights(case) | schedules(case)


def process_of(args: dict[str, Any], dtype: torch.dtype = torch.float32) -> FlowMatching:
    def built(group: type) -> Any:
        return group(**{name: value for name, value in args.items() if name in group.__dataclass_fields__})

    return FlowMatching(built(NoiseFlags), LossFlags(), built(FlowFlags), built(WeightingFlags), dtype)


def noised(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    latents = recipe.tensor("latents", case["inputs"]["latents"]["shape"], case["seed"])
    seed = case["inputs"]["torch_seed"]["value"]
    outputs = {}
    for row in case["facts"]["sampling"]:
        for suffix, dtype in (("", torch.float32), (".bf16", torch.bfloat16)):
            name = row["name"] + suffix
            if f"{name}.noisy" not in case["outputs"]:
                continue
            process = process_of(row["args"], dtype)
            result = process.add_noise(latents, Draws.seeded(seed))
            assert result.sigmas is not None
            outputs |= {
                f"{name}.timesteps": result.t,
                f"{name}.sigmas": result.sigmas.flatten(),
                f"{name}.noisy": result.x[:, ::8, ::2, ::2],
            }
    return outputs


def predictions(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    inputs = case["inputs"]
    sigmas = torch.tensor(inputs["sigmas_for_prediction"]["value"]).view(-1, 1, 1, 1)
    raw, x = (recipe.tensor(name, inputs[name]["shape"], case["seed"]) for name in ("model_pred", "noisy_input"))
    state = Noised(x, 1000 * sigmas.flatten(), torch.zeros_like(x), sigmas)
    return {
        f"prediction.{kind}": process_of({"model_prediction_type": kind}).prediction(raw, state)
        for kind in ("raw", "additive", "sigma_scaled")
    }


def weights(case: dict[str, Any]) -> dict[str, Tensor]:
    sigmas = torch.tensor(case["inputs"]["sigmas_for_prediction"]["value"])
    outputs = {}
    for scheme in SCHEMES:
        found = loss_weights(scheme, sigmas)
        outputs[f"weighting.{scheme}"] = torch.ones_like(sigmas) if found is None else found
        flags = WeightingFlags(scheme, logit_mean=0.3, logit_std=0.9, mode_scale=1.29)
        generator = torch.Generator().manual_seed(case["inputs"]["torch_seed"]["value"])
        outputs[f"density.{scheme}"] = draw_positions(9, flags, generator)
    return outputs


def schedules(case: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {}
    for name in case["outputs"]:
        kind, *parts = name.split(".")
        if kind == "flux_schedule":
            steps, tokens, shift = int(parts[0]), int(parts[1]), parts[2] == "shift"
            outputs[name] = sampling_schedule(steps, math.exp(log_shift(tokens)) if shift else 1.0)
        elif kind == "lumina_schedule":
            steps, tokens = int(parts[0]), int(parts[1])
            outputs[name] = sampling_schedule(steps, math.exp(log_shift(tokens)))[:-1]
        elif kind == "hunyuan_schedule":
            sigmas = sampling_schedule(int(parts[0]), 5.0)
            outputs[name] = sigmas if parts[1] == "sigmas" else 1000 * sigmas[:-1]
    return outputs | scheduler_tables()


def scheduler_tables() -> dict[str, Tensor]:
    outputs = {}
    for shift in (1.0, 3.0, 6.0):
        sigmas = process_of({"discrete_flow_shift": shift}).schedule[::37]
        name = f"scheduler_table.shift{shift}"
        outputs |= {f"{name}.sigmas": sigmas, f"{name}.timesteps": 1000 * sigmas}
    return outputs
