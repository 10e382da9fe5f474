"""Networks on Stable Diffusion XL: U-Net and both text encoders with adapters from a file, and with it merged in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.files.hashing import precalculate_safetensors_hashes
from library.files.weights import save_safetensors
from library.models.sdxl.architecture import size_embedding
from library.models.sdxl.checkpoint import load_text_encoders, load_unet
from library.models.sdxl.pooled_text import PooledTextEncoder
from networks import loha, lokr, lora
from networks.core.key_names import with_own_names
from networks.core.network import LoraNetwork
from tests.parity.adapters.lora import MULTIPLIERS, lora_weights
from tests.parity.adapters.sdxl import sizes_of

LORAS = ("", "_conv", "_blocks")
ALGORITHMS = {"loha": loha, "lokr": lokr}


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(case, recipe, Path(folder))
        outputs = model.outputs("base")
        for kind, module, facts, weights in kinds_of(case, recipe):
            check_shapes(model, module, facts, weights)
            if "sshs_model_hash" in facts:
                check_hash_and_norms(model, facts, weights)
            for multiplier in MULTIPLIERS:
                outputs |= model.with_network(module, weights, multiplier, f"{kind}_x{multiplier}".lstrip("_"))
        if "lora_keys_diffusers_names" in case:
            check_other_names(model, lora_weights(case, recipe, ""), set(case["lora_keys_diffusers_names"]))
    return {name: outputs[name] for name in case["outputs"]}


def kinds_of(case: dict[str, Any], recipe: ModuleType) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Tensor]]]:
    """The recorded networks: name, our module, settings and weights."""
    for kind in LORAS:
        if f"lora_keys{kind}" in case:
            yield kind.removeprefix("_"), lora, case[f"lora_facts{kind}"], lora_weights(case, recipe, kind)
    for kind, facts in case.get("network_facts", {}).items():
        alphas = case[f"alphas_{kind}"]
        weights = {
            key: torch.tensor(alphas.get(key, alphas.get("*")))
            if key.endswith(".alpha")
            else recipe.weight(key, tuple(shape), case["seed"])
            for key, (shape, _) in case[f"keys_{kind}"].items()
        }
        yield kind, ALGORITHMS[kind.partition("_")[0]], facts, weights


def check_shapes(model: Model, module: Any, facts: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """A network made from settings has the keys, shapes and alphas that were recorded, in the recorded order."""
    network = module.create_network(
        1.0, facts["network_dim"], facts["network_alpha"], None, model.views, model.unet, **facts["network_args"]
    )
    made = network.state_dict_for_saving()
    assert [(key, value.shape) for key, value in made.items()] == [(key, value.shape) for key, value in weights.items()]
    assert all(torch.equal(made[key], value) for key, value in weights.items() if key.endswith(".alpha"))
    assert len(network.unet_loras) == facts["unet_modules"]
    assert len(network.text_encoder_loras) == facts["text_encoder_modules"]


def check_hash_and_norms(model: Model, facts: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The file has the recorded hash, and --scale_weight_norms shrinks what it shrank."""
    network = model.created(lora, weights, 1.0)
    network.apply_to(None, nn.Module())
    network.load_state_dict(weights)
    saved = network.state_dict_for_saving(torch.float16)
    assert precalculate_safetensors_hashes(saved, {})[0] == facts["sshs_model_hash"]
    norms = facts["scale_weight_norms"]
    scaled, mean, largest = network.apply_max_norm_regularization(norms["max_norm_value"])
    assert scaled == norms["keys_scaled"]
    assert abs(mean - norms["mean_norm"]) < 1e-5 and abs(largest - norms["max_norm"]) < 1e-5
    model.load()


def check_other_names(model: Model, weights: dict[str, Tensor], names: set[str]) -> None:
    """The same file with the names of diffusers for the layers of the U-Net is the same file."""
    network, _ = lora.create_network_from_weights(1.0, None, None, model.views, model.unet, weights)
    theirs = {ours: other for other, ours in network.other_names.items()}
    renamed = with_own_names(weights, theirs)
    assert set(renamed) == names
    network, given = lora.create_network_from_weights(1.0, None, None, model.views, model.unet, renamed)
    network.apply_to(model.views, model.unet)
    assert list(given) == list(weights)
    assert not any(network.load_state_dict(dict(renamed)))
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict_for_saving().items())
    model.load()


class Model:
    """The recorded model, read from a file of its published layout."""

    def __init__(self, case: dict[str, Any], recipe: ModuleType, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), self.path)
        self.end_token = case["config"]["text_encoder_2"]["eos_token_id"]
        inputs, seed = case["inputs"], case["seed"]
        self.latents, self.context, pooled = (
            recipe.tensor(name, tuple(inputs[name]["shape"]), seed) for name in ("latents", "context", "pooled")
        )
        self.t = torch.tensor(inputs["timesteps"]["value"])
        self.vector = torch.cat([pooled, size_embedding(sizes_of(case))], dim=1)[: len(self.latents)]
        tokens = inputs["tokens"]
        self.tokens = recipe.token_ids("tokens", tuple(tokens["shape"]), tokens["low"], tokens["high"], seed)
        if "transform" in tokens:  # the texts end after 60 tokens
            self.tokens[:, 60:] = self.end_token
        self.load()

    def load(self) -> None:
        self.unet = load_unet(self.path, torch.float32, "cpu")
        self.first, self.second = load_text_encoders(self.path, self.end_token, torch.float32, "cpu")
        self.views: list[nn.Module] = [
            nn.ModuleDict({"text_model": self.first}),
            nn.ModuleDict({"text_model": self.second.text_model}),
        ]

    def with_network(self, module: Any, weights: dict[str, Tensor], multiplier: float, name: str) -> dict[str, Tensor]:
        network = self.created(module, weights, multiplier)
        network.apply_to(self.views, self.unet)
        network.load_state_dict(weights)
        network.eval()
        outputs = self.outputs(name)
        self.load()
        if multiplier == MULTIPLIERS[0]:
            return outputs
        self.created(module, weights, multiplier).merge_to(self.views, self.unet, weights)
        for key, merged in self.outputs(name).items():
            assert torch.allclose(merged, outputs[key], atol=2e-4, rtol=2e-4), f"{key}: merging differs from applying"
        self.load()
        return outputs

    def created(self, module: Any, weights: dict[str, Tensor], multiplier: float) -> LoraNetwork:
        network: LoraNetwork = module.create_network_from_weights(
            multiplier, None, None, self.views, self.unet, weights, for_inference=True
        )[0]
        return network

    def outputs(self, name: str) -> dict[str, Tensor]:
        """The U-Net's answer, the last states of both text encoders after their norm, and the pooled text."""
        first = self.first.final_layer_norm(self.first.states(self.tokens, 1)[0])
        second = self.second.text_model
        return {
            f"unet_{name}": self.unet(self.latents, self.t, self.context, self.vector),
            f"te1_{name}": first,
            f"te2_{name}": second.final_layer_norm(second.states(self.tokens, 1)[0]),
            f"te2_pooled_{name}": as_recorded(self.second)(self.tokens)[1],
        }


def as_recorded(second: PooledTextEncoder) -> PooledTextEncoder:
    """The program that was recorded multiplies the pooled text with the transposed projection."""
    return PooledTextEncoder(second.text_model, second.text_projection.T, second.end_token)
