"""A LoRA trained with each argument of networks.lora_flux has moved, and its file does what the training ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from demo_flux_folder import FluxDemo
from library.models.flux.checkpoint import load_transformer
from networks import lora_flux
from tests.clients.flux_training import train_flux

CASES: dict[str, tuple[str, list[str]]] = {
    "parts": ("dev", ["split_qkv=True", "rank_dropout=0.2", "module_dropout=0.1"]),
    "nudged": ("dev", ["ggpo_sigma=0.03", "ggpo_beta=0.01", "split_qkv=true", "loraplus_lr_ratio=4"]),
    "sizes": ("dev", ["img_attn_dim=2", "single_mod_dim=0", "in_dims=[4,2,2,2,4]", "network_reg_lrs=single=5e-3"]),
    "blocks": ("schnell", ["train_double_block_indices=0", "train_single_block_indices=none", "verbose=True"]),
    "text": ("dev", ["train_t5xxl=True", "network_reg_dims=te3=2,txt_mlp=0"]),
    "chroma": ("chroma", ["img_mlp_dim=6", "train_blocks=double"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_does_what_the_training_ended_with(small_flux: FluxDemo, tmp_path: Path, name: str) -> None:
    kind, args = CASES[name]
    words = [] if name == "text" else ["--network_train_unet_only"]
    trainer = train_flux(small_flux, tmp_path, "--learning_rate", "1e-2", *words, "--network_args", *args, kind=kind)
    tensors = load_file(tmp_path / "small.safetensors")
    ups = {key: value for key, value in tensors.items() if key.endswith("lora_up.weight")}
    assert ups and all(value.abs().max() > 0 for value in ups.values())
    assert any(key.startswith("lora_te3_") for key in ups) == (name == "text")
    trained = trainer.trained.network.eval()
    path, model_type = small_flux.transformer(kind), "chroma" if kind == "chroma" else "flux"
    fresh = load_transformer(path, model_type, torch.float32, "cpu")
    network, weights = lora_flux.create_network_from_weights(1.0, None, None, [], fresh, of_transformer(tensors))
    network.apply_to([], fresh)
    network.load_state_dict(weights)
    network.eval()
    compared = 0
    for layer_name, module in trainer.models.denoiser.named_modules():
        if hasattr(module, "_held") and isinstance(module, nn.Linear):
            x = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(compared))
            with torch.no_grad():
                torch.testing.assert_close(module(x), fresh.get_submodule(layer_name)(x), atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared == len(trained.unet_loras) == len(network.unet_loras) > 0


def of_transformer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith("lora_unet_")}


def test_a_nudged_run_that_is_continued_is_one_that_was_not_stopped(small_flux: FluxDemo, tmp_path: Path) -> None:
    def run(name: str, steps: int, *words: str) -> dict[str, Any]:
        args = ["--network_train_unet_only", "--network_args", "ggpo_sigma=0.3", "ggpo_beta=0.1", "train_blocks=double"]
        length = ["--max_train_steps", str(steps), "--save_state_on_train_end"]
        train_flux(small_flux, tmp_path / name, "--learning_rate", "1e-2", *length, *args, *words)
        return load_file(tmp_path / name / "small.safetensors")

    whole = run("whole", 4)
    run("half", 2)
    state = next((tmp_path / "half").glob("*-state"))
    continued = run("continued", 4, "--resume", str(state))
    assert whole.keys() == continued.keys()
    for key, value in whole.items():
        assert torch.equal(value, continued[key]), key
