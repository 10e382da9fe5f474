"""`networks.lora_flux` covers the layers, and makes the files, that published FLUX and Chroma LoRAs have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library.models.flux.chroma import ChromaTransformer
from library.models.flux.layout import flux_shape
from library.models.flux.model import FluxTransformer
from networks import lora_flux
from networks.core.network import LoraNetwork
from networks.core.parted import Parted

CASE = Path(__file__).resolve().parents[1] / "parity" / "cases" / "lora_flux" / "case.json"
SPELLED = {"train_t5xxl": "True"}
MENDED = {"train_t5xxl_lowercase_true_is_false"}
"""Recorded: `true` is false. Here it is what it says."""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def transformer(manifest: dict[str, Any]) -> nn.Module:
    """A transformer on the meta device with the sizes of a published or recorded file."""
    shape = flux_shape({key: tuple(size) for key, (size, _) in manifest.items()}, Path("file"))
    kind = ChromaTransformer if any("distilled_guidance_layer" in key for key in manifest) else FluxTransformer
    with torch.device("meta"):
        return kind(shape)


def encoders(clip: dict[str, int], t5: dict[str, int]) -> list[nn.Module]:
    with torch.device("meta"):
        settings = T5Config(**t5, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
        return [CLIPTextModel(CLIPTextConfig(**clip)), T5EncoderModel(settings)]


def full_size_encoders() -> list[nn.Module]:
    t5 = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
    return encoders({"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}, t5)


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return read(CASE)


def small(case: dict[str, Any], **args: str) -> LoraNetwork:
    config = case["config"]
    return lora_flux.create_network(
        1.0, 4, 1.0, None, encoders(config["clip"], config["t5"]), transformer(case["checkpoint"]), **args
    )


def saved(network: LoraNetwork) -> dict[str, Any]:
    return {key: [list(value.shape), "float32"] for key, value in network.state_dict_for_saving().items()}


@pytest.mark.parametrize(
    ("file", "model", "args"),
    [
        ("flux_lora", "flux_dev", {}),
        ("flux_lora", "flux_schnell", {}),
        ("flux_lora_split_qkv", "flux_dev", {"split_qkv": "True"}),
        ("chroma_lora", "chroma", {}),
    ],
)
def test_keys_and_shapes_of_full_size_models_are_the_published_ones(
    facts: Path, file: str, model: str, args: dict[str, str]
) -> None:
    manifest = read(facts / "checkpoints" / f"{model}.json")["keys"]
    network = lora_flux.create_network(1.0, 4, 1.0, None, [], transformer(manifest), **args)
    assert saved(network) == read(facts / "lora_keys" / f"{file}.json")["keys"]
    alphas = {float(value) for key, value in network.state_dict_for_saving().items() if key.endswith(".alpha")}
    assert alphas == ({1.0, 3.0, 4.0} if args else {1.0})


def test_keys_of_layers_before_the_blocks_are_the_published_ones(facts: Path) -> None:
    model = transformer(read(facts / "checkpoints" / "flux_dev.json")["keys"])
    args = {"in_dims": "[4,4,4,4,4]", "train_double_block_indices": "none", "train_single_block_indices": ""}
    network = lora_flux.create_network(1.0, 4, 1.0, None, [], model, **args)
    assert saved(network) == read(facts / "lora_keys" / "flux_lora_in_dims.json")["keys"]


def test_keys_of_full_size_text_encoders_are_the_published_ones(facts: Path) -> None:
    network = lora_flux.create_network(1.0, 4, 1.0, None, full_size_encoders(), nn.Module(), **SPELLED)
    assert saved(network) == read(facts / "lora_keys" / "flux_lora_te.json")["keys"]


def test_every_recorded_setting_gives_the_recorded_ranks_and_alphas(case: dict[str, Any]) -> None:
    config, compared = case["config"], 0
    for variant in case["facts"]["variants"]:
        if variant["name"] in MENDED:
            continue
        parts = encoders(config["clip"], config["t5"]), transformer(case["checkpoint"])
        dim, alpha = variant["network_dim"], variant["network_alpha"]
        network = lora_flux.create_network(1.0, dim, alpha, None, *parts, **variant["network_args"])
        pairs = list(network._pairs())
        made = {target.name: [target.shape.rank, target.shape.alpha] for target, _ in pairs}
        assert list(made.items()) == list(variant["modules"].items()), variant["name"]
        compared += 1
    assert compared == 16


def test_true_in_any_spelling_trains_t5(case: dict[str, Any]) -> None:
    for word in ("true", "1"):
        assert any("te3" in key for key in small(case, train_t5xxl=word).state_dict_for_saving())
    with pytest.raises(ValueError, match="train_t5xxl=yes: expected true or false"):
        small(case, train_t5xxl="yes")


def test_parameter_groups_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    for recorded in case["facts"]["lr_groups"]:
        network = small(case, **recorded["network_args"])
        network.apply_to([], nn.Module())
        names_of = {id(parameter): name for name, parameter in network.named_parameters()}
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(
            recorded["text_encoder_lr"], recorded["unet_lr"], recorded["learning_rate"]
        )
        made = [
            {
                "lr": pytest.approx(group["lr"], rel=1e-9),
                "description": name,
                "count": len(group["params"]),
                "first": [names_of[id(parameter)] for parameter in group["params"][:2]],
                "last": [names_of[id(group["params"][-1])]],
            }
            for name, group in zip(names, groups, strict=True)
        ]
        theirs = [{**group, "description": " ".join(group["description"].split())} for group in recorded["groups"]]
        assert made == theirs, recorded["name"]


def test_several_rates_name_both_text_encoders_when_t5_is_not_trained(case: dict[str, Any]) -> None:
    network = small(case)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-5], 1e-3)
    assert [(name, group["lr"]) for name, group in zip(names, groups)] == [("textencoder 1", 1e-4), ("unet", 1e-3)]


def model_with_weights(case: dict[str, Any]) -> nn.Module:
    """A few linear layers with the paths of a FLUX transformer, with numbers in them."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, layers: dict[str, nn.Module]) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

    double = Block({"img_attn": Block({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})})
    single = Block({"linear1": nn.Linear(8, 24 + 32), "linear2": nn.Linear(8 + 32, 8)})
    model = Block({"double_blocks": nn.ModuleList([double]), "single_blocks": nn.ModuleList([single])})
    return model.requires_grad_(False)


def test_a_split_network_trains_parts_and_its_file_does_the_same_without_them(case: dict[str, Any]) -> None:
    model = model_with_weights(case)
    network = lora_flux.create_network(1.0, 2, 1.0, None, [], model, split_qkv="true")
    network.apply_to([], model)
    for adapter in network.unet_loras:
        for up in adapter.lora_up.parameters():
            nn.init.normal_(up)
    assert [len(a.lora_down) for a in network.unet_loras if isinstance(a.lora_down, Parted)] == [3, 4]
    x = torch.randn(5, 8)
    qkv = model.double_blocks[0].img_attn.qkv
    answer = qkv(x)
    answer.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.unet_loras[0].parameters())
    tensors = network.state_dict_for_saving()
    assert float(tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 3.0
    assert float(tensors["lora_unet_single_blocks_0_linear1.alpha"]) == 4.0

    again = model_with_weights(case)
    whole, weights = lora_flux.create_network_from_weights(1.0, None, None, [], again, tensors, for_inference=True)
    whole.apply_to([], again)
    whole.load_state_dict(weights)
    assert torch.allclose(again.double_blocks[0].img_attn.qkv(x), answer, atol=1e-6)

    merged = model_with_weights(case)
    merger, _ = lora_flux.create_network_from_weights(1.0, None, None, [], merged, tensors, for_inference=True)
    merger.merge_to([], merged, tensors)
    assert torch.allclose(merged.double_blocks[0].img_attn.qkv(x), answer, atol=1e-5)


def test_a_split_file_can_be_trained_on_in_parts(case: dict[str, Any], tmp_path: Path) -> None:
    model = model_with_weights(case)
    network = lora_flux.create_network(1.0, 2, 1.0, None, [], model, split_qkv="true")
    network.apply_to([], model)
    file = tmp_path / "split.safetensors"
    network.save_weights(file, None, {})
    again = model_with_weights(case)
    loaded, _ = lora_flux.create_network_from_weights(1.0, str(file), None, [], again, split_qkv="true")
    loaded.apply_to([], again)
    assert not loaded.load_weights(file).missing_keys
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in network.named_parameters()]
    for ours, theirs in zip(loaded.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.unet_loras[0].scale == network.unet_loras[0].scale == 0.5


def test_a_file_that_was_not_split_is_not_loaded_as_parts(case: dict[str, Any], tmp_path: Path) -> None:
    model = model_with_weights(case)
    network = lora_flux.create_network(1.0, 12, 1.0, None, [], model)
    network.apply_to([], model)
    for adapter in network.unet_loras:
        nn.init.normal_(adapter.lora_up.weight)
    file = tmp_path / "whole.safetensors"
    network.save_weights(file, None, {})
    again = model_with_weights(case)
    parts, _ = lora_flux.create_network_from_weights(1.0, str(file), None, [], again, split_qkv="true")
    parts.apply_to([], again)
    with pytest.raises(ValueError, match=r"(?s)whole\.safetensors.*was not trained as 3 \(split_qkv\)"):
        parts.load_weights(file)


@pytest.mark.parametrize("split", ["true", "false"])
def test_a_step_with_every_training_argument_runs(case: dict[str, Any], split: str) -> None:
    model = model_with_weights(case)
    args = {"rank_dropout": "0.3", "module_dropout": "0.1", "ggpo_sigma": "0.03", "ggpo_beta": "0.01"}
    network = lora_flux.create_network(1.0, 2, 1.0, None, [], model, 0.2, split_qkv=split, **args)
    network.apply_to([], model)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([], None, 1e-2)
    optimizer = torch.optim.SGD(groups)
    network.prepare_grad_etc(None, model)
    network.on_epoch_start(None, model)
    before = [parameter.clone() for parameter in network.parameters()]
    for step in range(3):
        network.seed_step(step)
        network.on_step_start()
        loss: Tensor = model.single_blocks[0].linear1(torch.randn(4, 8)).square().mean()
        loss = loss + model.double_blocks[0].img_attn.qkv(torch.randn(4, 8)).square().mean()
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        network.update_norms()
        optimizer.step()
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(before, network.parameters(), strict=True))
    network.apply_max_norm_regularization(0.1)
    assert not any("perturbation" in key for key in network.state_dict_for_saving())


def test_layers_of_another_number_of_blocks_are_counted_in_the_model(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train_single_block_indices: there is no block 3: this model has 3, 0 to 2"):
        small(case, train_single_block_indices="1,3")
    with pytest.raises(ValueError, match="neither a number nor a range"):
        small(case, train_double_block_indices="first")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_attn_dims": "4"}, "does not know 'img_attn_dims'; did you mean 'img_attn_dim'?"),
        ({"only_if_contains": "x"}, "does not know 'only_if_contains'"),
        ({"single_dim": "-1"}, "single_dim: -1 is less than 0"),
        ({"in_dims": "4,4"}, "in_dims=4,4: expected 5 whole numbers"),
        ({"train_blocks": "both"}, "train_blocks=both: expected one of all, double, single"),
        ({"network_reg_dims": "img_attn"}, "'img_attn' is not pattern=whole number"),
        ({"network_reg_dims": "img_(attn=4"}, "'img_(attn' is not a regular expression"),
        ({"network_reg_lrs": "img=fast"}, "'img=fast' is not pattern=number"),
        ({"ggpo_sigma": "0.1"}, "ggpo_sigma needs ggpo_beta"),
        ({"split_qkv": "perhaps"}, "expected true or false"),
        ({"rank_dropout": "1"}, "must be at least 0 and less than 1"),
    ],
)
def test_nonsense_is_refused_by_name(case: dict[str, Any], args: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        small(case, **args)
    assert message in str(caught.value)


def test_arguments_that_concern_no_layer_are_named(case: dict[str, Any], facts: Path, caplog: Any) -> None:
    model = transformer(read(facts / "checkpoints" / "chroma.json")["keys"])
    args = {"img_mod_dim": "4", "in_dims": "2,2,0,0,2", "network_reg_dims": "te1=8,single=4,single_blocks_1_=2",
            "network_reg_lrs": "nothing=1e-3", "conv_dim": "4"}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        lora_flux.create_network(1.0, 4, 1.0, None, [], model, **args)
    assert "img_mod_dim=4 has no effect: this model has no such layers" in caplog.text
    assert "in_dims: 2 for time_in has no effect" in caplog.text
    assert "network_reg_dims: te1=8 has no effect: no layer has such a name" in caplog.text
    assert "single_blocks_1_=2 has no effect: an earlier pattern holds for all its layers" in caplog.text
    assert "network_reg_lrs: nothing=0.001 has no effect" in caplog.text
    assert "conv_dim has no effect: FLUX.1 and Chroma have no convolutions" in caplog.text


def test_verbose_names_every_layer_and_its_rank(case: dict[str, Any], caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        small(case, verbose="true", split_qkv="true", network_reg_dims="linear2=8")
    assert "lora_unet_single_blocks_2_linear2: rank 8, alpha 1" in caplog.messages
    assert "lora_unet_single_blocks_2_linear1: rank 4, alpha 1, 4 parts" in caplog.messages


def test_a_file_of_another_family_is_refused_and_sizes_come_from_the_file(case: dict[str, Any]) -> None:
    model = model_with_weights(case)
    sdxl = {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 8)}
    with pytest.raises(ValueError, match="it is a LoRA for SDXL"):
        lora_flux.create_network_from_weights(1.0, None, None, [], model, sdxl)
    ours = {"lora_unet_single_blocks_0_linear2.lora_down.weight": torch.ones(2, 40)}
    with pytest.raises(ValueError, match="single_dim has no effect with --dim_from_weights"):
        lora_flux.create_network_from_weights(1.0, None, None, [], model, ours, single_dim="4")
    with pytest.raises(ValueError, match="the model has 3 text encoders"):
        lora_flux.create_network(1.0, 4, 1.0, None, [nn.Module()] * 3, model)


def test_t5_is_covered_when_the_file_has_it_and_in_parts_of_a_file(case: dict[str, Any]) -> None:
    tensors = small(case, **SPELLED).state_dict_for_saving()
    config = case["config"]
    both = encoders(config["clip"], config["t5"])
    of_text = {key: value for key, value in tensors.items() if key.startswith("lora_te")}
    network, weights = lora_flux.create_network_from_weights(1.0, None, None, both, nn.Module(), of_text)
    network.apply_to(both, nn.Module())
    assert len(network.text_encoder_loras) == 12 + 14 and not network.unet_loras
    result = network.load_state_dict(weights, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
