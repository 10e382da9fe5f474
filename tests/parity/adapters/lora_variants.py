"""DyLoRA, LoRA-FA and OFT on Stable Diffusion 1.x: the keys of their files, and the U-Net with such a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from networks import dylora, lora, lora_fa, oft
from tests.parity.adapters.lora import MULTIPLIERS, Model

OFT = ("oft", "oft_all_linear", "oft_all_linear_conv")


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    facts = case["network_facts"]
    with tempfile.TemporaryDirectory() as folder:
        model = Model(case, recipe, Path(folder))
        outputs = model.outputs("base")
        check_keys(model, case, "dylora", dylora, facts["dylora"])
        check_keys(model, case, "dylora_conv", dylora, facts["dylora_conv"])
        # The same keys and shapes, of which only `up` is trained.
        network = check_keys(model, case, "dylora", lora_fa, {**facts["dylora"], "network_args": {}})
        assert sum(1 for _ in trained(network)) == facts["lora_fa"]["n_trainable"] // 2
        for kind in ("dylora", "dylora_conv"):
            outputs |= applied(model, lora, weights_of(case, recipe, kind, 1.0), 1.0, f"{kind}_as_lora")
        for kind in OFT:
            check_keys(model, case, kind, oft, facts[kind])
            weights = weights_of(case, recipe, kind, facts[kind]["network_alpha"])
            for multiplier in MULTIPLIERS:
                outputs |= applied(model, oft, weights, multiplier, f"{kind}_x{multiplier}")
    return {name: outputs[name] for name in case["outputs"]}


def weights_of(case: dict[str, Any], recipe: ModuleType, kind: str, alpha: float) -> dict[str, Tensor]:
    return {
        key: torch.tensor(alpha) if key.endswith(".alpha") else recipe.weight(key, tuple(shape), case["seed"])
        for key, (shape, _) in case[f"keys_{kind}"].items()
    }


def check_keys(model: Model, case: dict[str, Any], kind: str, module: Any, facts: dict[str, Any]) -> Any:
    """A network made from settings has the recorded keys and shapes."""
    encoder = [text_encoder_shaped_like(case)]
    network = module.create_network(
        1.0, facts["network_dim"], facts["network_alpha"], None, encoder, model.unet, **facts["network_args"]
    )
    made = {name: list(value.shape) for name, value in network.state_dict_for_saving().items()}
    assert made == {name: shape for name, (shape, _) in case[f"keys_{kind}"].items()}
    return network


def trained(network: Any) -> list[Tensor]:
    network.apply_to([], torch.nn.Module())
    groups, _ = network.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
    network.prepare_grad_etc(None, None)
    parameters = list(network.get_trainable_params())
    assert len(parameters) == sum(len(group["params"]) for group in groups)
    return parameters


def text_encoder_shaped_like(case: dict[str, Any]) -> Any:
    config = case["config"]["text_encoder"]
    with torch.device("meta"):
        return CLIPTextModel(
            CLIPTextConfig(
                num_hidden_layers=config["num_hidden_layers_in_file"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
            )
        )


def applied(model: Model, module: Any, weights: dict[str, Tensor], multiplier: float, name: str) -> dict[str, Tensor]:
    """The U-Net's answer with the file standing in it, which is the answer with the file merged into it."""
    encoder: list[Any] = []
    network, _ = module.create_network_from_weights(
        multiplier, None, None, encoder, model.unet, weights, for_inference=True
    )
    network.apply_to(encoder, model.unet)
    network.load_state_dict(weights, strict=False)
    network.eval()
    outputs = model.outputs(name)
    model.load()
    merger, _ = lora.create_network_from_weights(multiplier, None, None, encoder, model.unet, weights)
    merger.merge_to(encoder, model.unet, weights)
    for key, merged in model.outputs(name).items():
        assert torch.allclose(merged, outputs[key], atol=2e-4, rtol=2e-4), f"{key}: merging differs from applying"
    model.load()
    return outputs
