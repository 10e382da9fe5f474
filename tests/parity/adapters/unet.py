"""Runs the cases of the U-Net: writes the checkpoint, loads it as a user's file, answers the recorded inputs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import save_safetensors
from library.models.sd.checkpoint import load_unet


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), file)
        unet = load_unet(file, case["config"]["use_linear_projection"], torch.float32, "cpu")
    shapes = {name: entry["shape"] for name, entry in case["inputs"].items() if entry["kind"] == "tensor"}
    inputs = {name: recipe.tensor(name, shape, case["seed"]) for name, shape in shapes.items()}
    t = torch.tensor(case["inputs"]["timesteps"]["value"])
    states: list[Tensor] = []
    hook = unet.mid_block.register_forward_hook(lambda module, args, output: states.append(output))
    latents, context = inputs["latents"], inputs["context"]
    outputs = {"out": unet(latents, t, context)}
    hook.remove()
    outputs["mid"] = states[0]
    outputs["out_odd"] = unet(inputs["latents_odd"], t[:1], context[:1])
    outputs["out_long"] = unet(latents[:1], t[1:], inputs["context_long"])
    return outputs
