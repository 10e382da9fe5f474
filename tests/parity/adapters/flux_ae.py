"""Runs the case of the FLUX.1 autoencoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import save_safetensors
from library.models.vae.flux import SCALE, SHIFT, decode, encode, load_ae


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ae.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), file)
        vae = load_ae(file, "--ae", torch.float32, "cpu")
    pixels = recipe.tensor("pixels", case["inputs"]["pixels"]["shape"], case["seed"]) * 0.5
    latents = recipe.tensor("latents", case["inputs"]["latents"]["shape"], case["seed"])
    posterior = vae.encode(pixels).latent_dist
    return {
        "moments": posterior.parameters,
        "latents_mean": (posterior.mean - SHIFT) * SCALE,
        "latents_sampled": encode(vae, pixels, torch.Generator().manual_seed(1234)),
        "decoded": decode(vae, latents),
    }
