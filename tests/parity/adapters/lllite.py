"""Runs the case of ControlNet-LLLite: its weights are written, and read as a user's file on a U-Net."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import save_safetensors
from library.models.sdxl.architecture import size_embedding
from library.models.sdxl.checkpoint import load_unet
from networks.control_net_lllite import create_network, sizes_in_file
from tests.parity.adapters.sdxl import sizes_of, written

FIRST = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        unet = load_unet(written(case, recipe, folder), torch.float32, torch.device("cpu"))
        weights = recipe.state_dict(case["lllite_keys"], case["seed"])
        file = Path(folder) / "lllite.safetensors"
        save_safetensors(weights, file)
        assert sizes_in_file(file) == (case["lllite_dims"]["cond_emb_dim"], case["lllite_dims"]["network_dim"])
        network = create_network(unet, file).eval()
    network.apply_to()
    latents, context, pooled = (
        recipe.tensor(name, tuple(case["inputs"][name]["shape"]), case["seed"])
        for name in ("latents", "context", "pooled")
    )
    image = recipe.tensor("cond_image", tuple(case["inputs"]["cond_image"]["shape"]), case["seed"]).clamp(-2, 2) / 2
    t = torch.tensor(case["inputs"]["timesteps"]["value"])
    vector = torch.cat([pooled, size_embedding(sizes_of(case))], dim=1)

    def answer(picture: Tensor | None, multiplier: float) -> Tensor:
        network.set_cond_image(picture)
        network.set_multiplier(multiplier)
        out: Tensor = unet(latents, t, context, vector)
        return out

    outputs = {
        "unet_base": answer(None, 1.0),
        "unet_x1.0": answer(image, 1.0),
        "unet_x0.5": answer(image, 0.5),
        "unet_one_image": answer(image[:1], 1.0),
    }
    assert torch.equal(answer(image, 0.0), outputs["unet_base"])
    network.set_cond_image(image)
    return outputs | {"cond_emb_input_blocks_4": getattr(network, FIRST).embedding()}
