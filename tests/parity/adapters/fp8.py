"""Weights rounded to float8 with scales, and a linear layer on them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.fp8 import SCALE_NAME, Format, Quantizer, Scaling
from library.memory.frozen_layers import attach_frozen_layers

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    """Every weight in every mode of the case, as float32; scales as they are stored."""
    seed, block = case["seed"], case["config"]["block"]
    weights = {key: recipe.weight(key, shape, seed) for key, (shape, _) in case["checkpoint"].items()}
    first = next(iter(weights))
    weights[first][1] = 0.0
    weights[first][2, 3] = 40.0
    outputs: dict[str, Tensor] = {}
    for mode, scaling in (("tensor", Scaling.TENSOR), ("channel", Scaling.CHANNEL), ("block", Scaling.BLOCK)):
        for name, dtype in FORMATS.items():
            if name == "e5m2" and mode != "block":
                continue
            rounded, scales = read(weights, Format(scaling, block, dtype))
            for key, value in rounded.items():
                if key.rpartition(".")[0] in scales and key.endswith(".weight"):
                    outputs[f"{mode}.{name}/{key}"] = value.float()
            for layer, scale in scales.items():
                outputs[f"{mode}.{name}/{layer}.{SCALE_NAME}"] = scale.reshape(-1) if scale.dim() == 0 else scale
            if name == "e4m3":
                outputs[f"linear.{mode}"] = linear(rounded[first], scales[first.rpartition(".")[0]], case, recipe)
    halves = {key: value.bfloat16() for key, value in weights.items()}
    outputs["bf16_file/scale"] = read(halves, Format(Scaling.BLOCK, block))[1][first.rpartition(".")[0]]
    return outputs


def read(weights: dict[str, Tensor], form: Format) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as the quantizer sees it, and the scales."""
    quantizer = Quantizer(form, targets=("blocks",), excluded=("norm", "_emb"))
    return {key: quantizer(key, value) for key, value in weights.items()}, quantizer.scales


def linear(weight: Tensor, scale: Tensor, case: dict[str, Any], recipe: ModuleType) -> Tensor:
    """The layer of a model, with its handle."""
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias.copy_(recipe.weight("bias", [weight.shape[0]], case["seed"]))
    model = nn.Sequential(layer)
    attach_frozen_layers(model, scales={"0": scale})
    out: Tensor = model(recipe.tensor("x", case["inputs"]["x"]["shape"], case["seed"]))
    return out
