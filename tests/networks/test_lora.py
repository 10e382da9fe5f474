"""`networks.lora` covers the layers, and makes the files, that published Stable Diffusion LoRAs have."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models.sd.unet import UNet, UNetShape
from networks import lora
from networks.core.blocks import sd_block_index
from networks.core.network import LoraNetwork
from networks.lora import SD, adaptable_layers
from tests.parity import recipe

CASE = Path(__file__).resolve().parents[1] / "parity" / "cases" / "lora_sd" / "case.json"
SD15 = UNetShape((320, 640, 1280, 1280), (8, 8, 8, 8), (1, 1, 1, 0), 1, 2, 768, 1280, use_linear=False)
SD21 = UNetShape((320, 640, 1280, 1280), (5, 10, 20, 20), (1, 1, 1, 0), 1, 2, 1024, 1280, use_linear=True)
TINY = UNetShape((32, 64, 96, 96), (8, 8, 8, 8), (1, 1, 1, 0), 1, 2, 64, 128, use_linear=False)


def on_meta(shape: UNetShape, layers: int = 12, width: int = 768) -> tuple[UNet, CLIPTextModel]:
    with torch.device("meta"):
        text = CLIPTextConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width)
        return UNet(shape), CLIPTextModel(text)


def tiny() -> tuple[UNet, CLIPTextModel]:
    return on_meta(TINY, layers=6, width=128)


def sd15(**args: Any) -> LoraNetwork:
    unet, encoder = on_meta(SD15)
    return lora.create_network(1.0, 4, 1.0, None, encoder, unet, **args)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return read(CASE)


def filled(case: dict[str, Any], kind: str = "") -> tuple[LoraNetwork, dict[str, Tensor]]:
    """A network of the recorded kind, with the weights it was recorded with."""
    alphas = case[f"lora_alphas{kind}"]
    weights = {
        key: torch.tensor(alphas.get(key, alphas.get("*")))
        if key.endswith(".alpha")
        else recipe.weight(key, tuple(shape), case["seed"])
        for key, (shape, _) in case[f"lora_keys{kind}"].items()
    }
    unet, encoder = tiny()
    facts = case[f"lora_facts{kind}"]
    network = lora.create_network(
        1.0, facts["network_dim"], facts["network_alpha"], None, encoder, unet, **facts["network_args"]
    )
    network.apply_to(encoder, unet)
    network.load_state_dict(weights)
    return network, weights


@pytest.mark.parametrize("kind", ["lora", "locon"])
@pytest.mark.parametrize("version", ["sd15", "sd21"])
def test_keys_and_shapes_of_full_size_models_are_the_published_ones(facts: Path, version: str, kind: str) -> None:
    recorded = read(facts / "lora_keys" / f"{version}_{kind}.json")
    unet, encoder = on_meta(SD15) if version == "sd15" else on_meta(SD21, layers=23, width=1024)
    args = {"conv_dim": "8", "conv_alpha": "4"} if kind == "locon" else {}
    network = lora.create_network(1.0, 16, 8, None, encoder, unet, **args)
    made = {key: list(value.shape) for key, value in network.state_dict_for_saving().items()}
    expected = {key: shape for key, (shape, _) in recorded["keys"].items()}
    if version == "sd21":  # recorded from a single file, which has 1x1 convolutions at the ends of the transformers
        for key, shape in expected.items():
            if "_proj_in." in key or "_proj_out." in key:
                expected[key] = shape[:2]
    assert list(made.items()) == list(expected.items())
    assert len(network.text_encoder_loras) == recorded["text_encoder_modules"]
    assert len(network.unet_loras) == recorded["unet_modules"]


def test_every_layer_is_in_its_recorded_block(facts: Path) -> None:
    recorded = read(facts / "lora_blocks_sd15.json")["block_index"]
    unet, _ = on_meta(SD15)
    layers = adaptable_layers(unet, SD.all)
    assert {f"lora_unet_{path.replace('.', '_')}": sd_block_index(path) for path, *_ in layers} == recorded


def test_parameter_groups_equal_the_recorded_ones(facts: Path) -> None:
    compared = 0
    for recorded in read(facts / "lora_plus_groups.json")["cases"]:
        if recorded["model"] != "sd15":
            continue
        network = sd15(**recorded["network_args"])
        network.apply_to(None, nn.Module())
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(
            recorded["text_encoder_lr"], recorded["unet_lr"], recorded["learning_rate"]
        )
        ours = [(name, group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)]
        theirs = [(group["description"], group["lr"], group["tensors"]) for group in recorded["groups"]]
        assert [(name, count) for name, _, count in ours] == [(name, count) for name, _, count in theirs]
        assert [rate for _, rate, _ in ours] == pytest.approx([rate for _, rate, _ in theirs], rel=1e-9)
        compared += 1
    assert compared == 9


@pytest.mark.parametrize("kind", ["", "_conv", "_blocks"])
def test_hash_and_norms_of_recorded_weights_are_the_recorded_ones(
    case: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    network, _ = filled(case, kind)
    recorded = case[f"lora_facts{kind}"]
    file = tmp_path / "lora.safetensors"
    network.save_weights(file, torch.float16, {})
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["sshs_model_hash"] == recorded["sshs_model_hash"]
    norms = recorded["scale_weight_norms"]
    scaled, mean, largest = network.apply_max_norm_regularization(norms["max_norm_value"])
    assert scaled == norms["keys_scaled"]
    assert (mean, largest) == pytest.approx((norms["mean_norm"], norms["max_norm"]), rel=1e-5)


def test_defaults_are_rank_4_and_alpha_1() -> None:
    unet, encoder = tiny()
    network = lora.create_network(1.0, None, None, None, encoder, unet)
    assert {(adapter.rank, adapter.scale) for adapter in network.unet_loras} == {(4, 0.25)}
    network = lora.create_network(1.0, 8, 0, None, encoder, unet)
    assert {(adapter.rank, adapter.scale) for adapter in network.unet_loras} == {(8, 1.0)}


def test_one_text_encoder_may_come_in_a_list_and_two_get_numbers() -> None:
    unet, encoder = tiny()
    assert list(lora.create_network(1.0, 4, 1, None, [encoder], unet).state_dict_for_saving()) == list(
        lora.create_network(1.0, 4, 1, None, encoder, unet).state_dict_for_saving()
    )
    with torch.device("meta"):
        second = CLIPTextModelWithProjection(encoder.config)
    network = lora.create_network(1.0, 4, 1, None, [encoder, second], unet)
    keys = [key for key in network.state_dict_for_saving() if key.startswith("lora_te")]
    assert keys[0] == "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.alpha"
    assert keys[len(keys) // 2] == "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.alpha"


def test_blocks_of_weight_or_rank_zero_have_no_adapters() -> None:
    ranks = ",".join("0" if i in (1, 2) else "3" for i in range(25))
    unet, encoder = tiny()
    network = lora.create_network(1.0, 4, 1, None, encoder, unet, block_dims=ranks, mid_lr_weight="0")
    names = {key.partition(".")[0] for key in network.state_dict_for_saving()}
    assert not any(name.startswith(("lora_unet_down_blocks_0", "lora_unet_mid_block")) for name in names)
    assert len(network.unet_loras) == 192 - 3 * 12
    assert {adapter.rank for adapter in network.unet_loras} == {3}
    assert {adapter.rank for adapter in network.text_encoder_loras} == {4}


def test_a_network_from_weights_has_their_layers_ranks_and_alphas(case: dict[str, Any]) -> None:
    _, weights = filled(case, "_blocks")
    some = {key: value for key, value in weights.items() if "mid_block" not in key and "lora_te" not in key}
    unet, encoder = tiny()
    network, given = lora.create_network_from_weights(1.0, None, None, encoder, unet, some)
    assert given is some
    network.apply_to(encoder, unet)
    result = network.load_state_dict(dict(given))
    assert not result.missing_keys
    assert {key: value.shape for key, value in network.state_dict_for_saving().items()} == {
        key: value.shape for key, value in some.items()
    }


def test_a_file_of_another_family_is_refused_and_stray_keys_are_reported(
    case: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, weights = filled(case)
    unet, encoder = tiny()
    other = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}
    file = tmp_path / "other.safetensors"
    network.write_weights(other, file, None)
    with pytest.raises(ValueError, match="other.safetensors.*LoRA for FLUX"):
        lora.create_network_from_weights(1.0, str(file), None, encoder, unet)
    with caplog.at_level(logging.WARNING):
        lora.create_network_from_weights(1.0, None, None, encoder, unet, weights | other)
    assert "1 keys belong to no layer, such as lora_unet_double_blocks_0" in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"conv_dims": "4"}, "did you mean 'conv_dim'"),
        ({"conv_alpha": "1"}, "conv_alpha needs conv_dim"),
        ({"conv_dim": "0"}, "conv_dim: 0 is less than 1"),
        ({"module_dropout": "1.5"}, "module_dropout: 1.5 must be at least 0 and less than 1"),
        ({"loraplus_lr_ratio": "0"}, "loraplus_lr_ratio"),
        ({"neuron_dropout": 1.0}, "--network_dropout 1.0"),
    ],
)
def test_mistakes_in_the_arguments_are_named(args: dict[str, Any], message: str) -> None:
    unet, encoder = tiny()
    with pytest.raises(ValueError, match=message):
        lora.create_network(1.0, 4, 1, None, encoder, unet, **args)


def test_a_rank_below_one_and_sizes_beside_a_file_are_refused(case: dict[str, Any]) -> None:
    unet, encoder = tiny()
    with pytest.raises(ValueError, match="--network_dim 0"):
        lora.create_network(1.0, 0, 1, None, encoder, unet)
    with pytest.raises(ValueError, match="conv_dim has no effect with --dim_from_weights"):
        lora.create_network_from_weights(1.0, None, None, encoder, unet, {}, conv_dim="4")


def test_the_three_kinds_of_dropout_reach_the_adapters() -> None:
    unet, encoder = tiny()
    network = lora.create_network(
        1.0, 4, 1, None, encoder, unet, neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3"
    )
    dropout = network.unet_loras[0].dropout
    assert (dropout.neuron, dropout.rank, dropout.module) == (0.1, 0.2, 0.3)
