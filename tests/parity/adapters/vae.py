"""Runs the cases of the autoencoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import save_safetensors
from library.models.vae.sd import load_vae


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vae.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), file)
        vae = load_vae(file, "sd", "--vae", torch.float32, "cpu")
    images = recipe.tensor("images", case["inputs"]["images"]["shape"], case["seed"]).clamp(-3, 3) / 3
    latents = recipe.tensor("latents", case["inputs"]["latents"]["shape"], case["seed"])
    posterior = vae.encode(images).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": vae.decode(latents).sample}
