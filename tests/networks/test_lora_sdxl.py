"""`networks.lora` on Stable Diffusion XL: layers, blocks and files of published LoRAs, under either set of names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.models.sdxl.unet import SdxlUNet, UNetShape
from networks import lora
from networks.core.blocks import sdxl_block_index
from networks.core.key_names import with_own_names
from networks.core.network import LoraNetwork
from networks.lora import SDXL, adaptable_layers

FULL = UNetShape((320, 640, 1280), (0, 2, 10), 10, 2, 2048, 2816, 1280)
TINY = UNetShape((32, 64, 64), (0, 1, 1), 1, 2, 48, 64, 32)


def encoders(*sizes: tuple[int, int, int]) -> list[nn.Module]:
    """Text encoders of so many layers, width and width of the MLP."""
    return [
        CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=inner))
        for layers, width, inner in sizes
    ]


@pytest.fixture(scope="module")
def full() -> tuple[SdxlUNet, list[nn.Module]]:
    with torch.device("meta"):
        return SdxlUNet(FULL), encoders((12, 768, 3072), (32, 1280, 5120))


def tiny() -> tuple[SdxlUNet, list[nn.Module]]:
    torch.manual_seed(0)
    return SdxlUNet(TINY).requires_grad_(False), encoders((1, 32, 64), (1, 48, 96))


def network_on(models: tuple[SdxlUNet, list[nn.Module]], **args: Any) -> LoraNetwork:
    unet, texts = models
    return lora.create_network(1.0, args.pop("rank", 4), args.pop("alpha", 1.0), None, texts, unet, **args)


def numbers(network: LoraNetwork) -> dict[str, Tensor]:
    """What a file of `network` holds, with random numbers, in halves as files have it."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: value if key.endswith("alpha") else torch.randn(value.shape, generator=generator).half()
        for key, value in network.state_dict_for_saving().items()
    }


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["lora", "locon"])
def test_keys_and_shapes_at_full_size_are_the_published_ones(facts: Path, full: Any, kind: str) -> None:
    recorded = read(facts / "lora_keys" / f"sdxl_{kind}.json")
    args = {"conv_dim": "8", "conv_alpha": "4"} if kind == "locon" else {}
    network = network_on(full, rank=16, alpha=8, **args)
    made = {key: list(value.shape) for key, value in network.state_dict_for_saving().items()}
    assert list(made.items()) == [(key, shape) for key, (shape, _) in recorded["keys"].items()]
    assert len(network.text_encoder_loras) == recorded["text_encoder_modules"]
    assert len(network.unet_loras) == recorded["unet_modules"]


def test_every_layer_is_in_its_recorded_block(facts: Path, full: Any) -> None:
    recorded = read(facts / "lora_blocks_sdxl.json")
    layers = adaptable_layers(full[0], SDXL.all)
    assert {f"lora_unet_{path.replace('.', '_')}": sdxl_block_index(path) for path, *_ in layers} == (
        recorded["block_index"]
    )
    ends = ("time_embed", "label_emb", "out.", "input_blocks.0.")
    assert not any(path.startswith(ends) for path, *_ in layers)


def test_parameter_groups_equal_the_recorded_ones(facts: Path, full: Any) -> None:
    compared = 0
    for recorded in read(facts / "lora_plus_groups.json")["cases"]:
        if recorded["model"] != "sdxl":
            continue
        network = network_on(full, **recorded["network_args"])  # not applied: the models serve all cases
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(
            recorded["text_encoder_lr"], recorded["unet_lr"], recorded["learning_rate"]
        )
        ours = [(name, len(group["params"])) for name, group in zip(names, groups, strict=True)]
        assert ours == [(group["description"], group["tensors"]) for group in recorded["groups"]]
        rates = [group["lr"] for group in groups]
        assert rates == pytest.approx([group["lr"] for group in recorded["groups"]], rel=1e-9)
        compared += 1
    assert compared == 9


def test_two_rates_are_those_of_clip_l_and_of_bigg_and_zero_leaves_one_out() -> None:
    network = network_on(tiny(), loraplus_text_encoder_lr_ratio="2")
    network.apply_to(None, nn.Module())
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 3e-5], 1e-3, 5e-4)
    rates = {name: (group["lr"], group["params"][0].shape[1]) for name, group in zip(names, groups, strict=True)}
    assert names == ["textencoder 1", "textencoder 1 plus", "textencoder 2", "textencoder 2 plus", "unet"]
    assert [rates[name][0] for name in names] == pytest.approx([1e-4, 2e-4, 3e-5, 6e-5, 1e-3])
    assert (rates["textencoder 1"][1], rates["textencoder 2"][1]) == (32, 48), "the width tells the encoder"

    network = network_on(tiny())
    network.apply_to(None, nn.Module())
    _, names = network.prepare_optimizer_params_with_multiple_te_lrs([0.0, 3e-5], 1e-3, 5e-4)
    assert names == ["textencoder 2", "unet"]
    assert not any(key.startswith("lora_te1_") for key in network.state_dict_for_saving())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"block_dims": ",".join(["4"] * 25)}, "block_dims.*23"),
        ({"block_dims": ",".join(["4"] * 23), "block_alphas": "1,2"}, "block_alphas.*23"),
        ({"down_lr_weight": "x"}, "down_lr_weight=x: expected 9 numbers"),
    ],
)
def test_block_settings_of_another_count_name_the_count(args: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network_on(tiny(), **args)


def in_other_names(network: LoraNetwork, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(with_own_names(weights, {ours: theirs for theirs, ours in network.other_names.items()}))


def test_a_file_with_the_names_of_diffusers_is_read_and_written_with_the_usual_ones(tmp_path: Path) -> None:
    models = tiny()
    network = network_on(models, conv_dim="2")
    weights = numbers(network)
    theirs = in_other_names(network, weights)
    renamed = sorted(theirs.keys() - weights.keys())
    assert len(renamed) == 3 * len(network.unet_loras)
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.alpha" in renamed
    assert "lora_unet_up_blocks_0_upsamplers_0_conv.lora_up.weight" in renamed
    assert "lora_unet_down_blocks_0_resnets_0_time_emb_proj.lora_down.weight" in renamed
    file = tmp_path / "theirs.safetensors"
    network.write_weights(theirs, file, None)

    network.apply_to(None, nn.Module())
    network.load_weights(file)
    saved = network.state_dict_for_saving(torch.float16)
    assert list(saved) == list(weights)
    assert all(torch.equal(saved[key], value.half()) for key, value in weights.items())

    again, given = lora.create_network_from_weights(1.0, str(file), None, *reversed(tiny()))
    again.apply_to(None, nn.Module())
    assert not any(again.load_state_dict(dict(given), strict=True))
    assert list(again.state_dict_for_saving()) == list(weights)


def test_merging_a_file_gives_the_same_weights_under_either_set_of_names() -> None:
    merged = []
    for rename in (False, True):
        unet, texts = tiny()
        network = network_on((unet, texts), conv_dim="2")
        weights = numbers(network)
        weights = in_other_names(network, weights) if rename else weights
        before = {key: value.clone() for key, value in unet.state_dict().items()}
        network.merge_to(texts, unet, weights)
        changed = [key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])]
        assert len(changed) == len(network.unet_loras)
        merged.append(unet.state_dict())
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


def test_a_lora_for_stable_diffusion_1_is_refused_although_some_of_its_names_are_there() -> None:
    unet, texts = tiny()
    paths = ("down_blocks_0_attentions_0", "down_blocks_1_attentions_0")
    weights = {
        f"lora_unet_{path}_transformer_blocks_0_attn1_to_q.{end}": torch.ones(shape)
        for path in paths
        for end, shape in (("lora_down.weight", (4, 64)), ("lora_up.weight", (64, 4)))
    }
    with pytest.raises(ValueError, match=r"it is a LoRA for Stable Diffusion 1.x or 2.x"):
        lora.create_network_from_weights(1.0, "sd15.safetensors", None, texts, unet, weights)


def test_a_file_for_a_larger_model_of_the_same_names_is_refused_when_it_is_merged() -> None:
    unet, texts = tiny()
    name = "lora_unet_input_blocks_4_1_proj_in"
    weights = {f"{name}.lora_down.weight": torch.ones(4, 640), f"{name}.lora_up.weight": torch.ones(640, 4)}
    network, _ = lora.create_network_from_weights(1.0, None, None, texts, unet, weights)
    with pytest.raises(ValueError, match=rf"{name} in the file does not fit a layer of shape \[64, 64\]"):
        network.merge_to(texts, unet, weights)


def blocks_of(keys: Sequence[str]) -> set[int]:
    return {int(key.split("_")[4]) for key in keys if key.startswith("lora_unet_input_blocks")}


def test_ranks_and_shares_of_the_rate_go_to_their_blocks() -> None:
    ranks = ",".join("0" if block == 5 else str(block) for block in range(23))
    network = network_on(tiny(), block_dims=ranks, up_lr_weight="0,0,0,0,0,0,1,1,1", mid_lr_weight="1,.5,1")
    made = network.state_dict_for_saving()
    assert blocks_of(list(made)) == {5, 7, 8}, "input block 4 is block 5"
    assert {made[key].shape[0] for key in made if "input_blocks_7" in key and "lora_down" in key} == {8}
    assert not any("output_blocks" in key for key in made), "only output blocks 0 to 5 have transformers"
    network.apply_to(None, nn.Module())
    groups, names = network.prepare_optimizer_params(None, 1e-3, 1e-4)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates == pytest.approx(
        {"textencoder": 1e-4, "unet_block6": 1e-3, "unet_block8": 1e-3, "unet_block9": 1e-3, "unet_block11": 5e-4}
    )
