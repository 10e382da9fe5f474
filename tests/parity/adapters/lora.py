"""LoRA on Stable Diffusion: U-Net and text encoder with adapters from a file, and with the file merged in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.files.weights import save_safetensors
from library.models.sd.checkpoint import load_text_encoder, load_unet
from networks import lora

MULTIPLIERS = (1.0, 0.5)


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(case, recipe, Path(folder))
        outputs = model.outputs("base")
        model.check_shapes()
        for kind in ("", "_conv", "_blocks"):
            if f"lora_keys{kind}" not in case:
                continue
            weights = lora_weights(case, recipe, kind)
            for multiplier in MULTIPLIERS:
                outputs |= model.with_lora(weights, multiplier, f"{kind.removeprefix('_')}_x{multiplier}".lstrip("_"))
    return {name: outputs[name] for name in case["outputs"]}


def lora_weights(case: dict[str, Any], recipe: ModuleType, kind: str) -> dict[str, Tensor]:
    alphas = case[f"lora_alphas{kind}"]
    return {
        key: torch.tensor(alphas.get(key, alphas.get("*")))
        if key.endswith(".alpha")
        else recipe.weight(key, tuple(shape), case["seed"])
        for key, (shape, _) in case[f"lora_keys{kind}"].items()
    }


class Model:
    def __init__(self, case: dict[str, Any], recipe: ModuleType, folder: Path) -> None:
        self.case, self.path = case, folder / "model.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), self.path)
        self.v2 = case["config"]["unet"]["use_linear_projection"]
        inputs = case["inputs"]
        self.latents, self.context = (
            recipe.tensor(name, tuple(inputs[name]["shape"]), case["seed"]) for name in ("latents", "context")
        )
        self.t = torch.tensor(inputs["timesteps"]["value"])
        self.tokens = None
        if tokens := inputs.get("tokens"):
            self.tokens = recipe.token_ids(
                "tokens", tuple(tokens["shape"]), tokens["low"], tokens["high"], case["seed"]
            )
        self.load()

    def load(self) -> None:
        self.unet = load_unet(self.path, self.v2, torch.float32, "cpu")
        self.encoders: list[nn.Module] = []
        if self.tokens is not None:
            self.encoders = [load_text_encoder(self.path, self.v2, torch.float32, "cpu")]

    def check_shapes(self) -> None:
        """A network made from settings has the keys and shapes that were recorded, in the recorded order."""
        for kind in ("", "_conv", "_blocks"):
            if f"lora_keys{kind}" not in self.case:
                continue
            facts = self.case[f"lora_facts{kind}"]
            network = lora.create_network(
                1.0,
                facts["network_dim"],
                facts["network_alpha"],
                None,
                self.encoders,
                self.unet,
                **facts["network_args"],
            )
            made = {name: list(value.shape) for name, value in network.state_dict_for_saving().items()}
            recorded = {name: shape for name, (shape, _) in self.case[f"lora_keys{kind}"].items()}
            # Recorded from a single file, 2.x has the ends of its transformers as 1x1 convolutions.
            flat = {name: shape[:2] if made[name] == shape[:2] else shape for name, shape in recorded.items()}
            assert list(made.items()) == list(flat.items())
            assert len(network.unet_loras) == facts["unet_modules"]
            assert len(network.text_encoder_loras) == facts.get("text_encoder_modules", 0)

    def with_lora(self, weights: dict[str, Tensor], multiplier: float, name: str) -> dict[str, Tensor]:
        network, weights = lora.create_network_from_weights(
            multiplier, None, None, self.encoders, self.unet, weights, for_inference=True
        )
        network.apply_to(self.encoders, self.unet)
        network.load_state_dict(weights)
        network.eval()
        outputs = self.outputs(name)
        self.load()
        merger, _ = lora.create_network_from_weights(multiplier, None, None, self.encoders, self.unet, weights)
        merger.merge_to(self.encoders, self.unet, weights)
        for key, merged in self.outputs(name).items():
            assert torch.allclose(merged, outputs[key], atol=2e-4, rtol=2e-4), f"{key}: merging differs from applying"
        self.load()
        return outputs

    def outputs(self, name: str) -> dict[str, Tensor]:
        outputs = {f"unet_{name}": self.unet(self.latents, self.t, self.context)}
        for encoder in self.encoders:
            outputs[f"te_{name}"] = encoder(self.tokens)
        return outputs
