"""Every kind of network goes on the layers of any family, with the arguments that are known for it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.models.sd.unet import UNet, UNetShape
from networks import lora, lora_flux
from networks.families import family_of

TINY = UNetShape((32, 64, 96, 96), (8, 8, 8, 8), (1, 1, 1, 0), 1, 2, 64, 128, use_linear=False)
VALUES = {
    "block_dims": ",".join(["4"] * 25), "block_alphas": ",".join(["1"] * 25),
    "conv_block_dims": ",".join(["4"] * 25), "conv_block_alphas": ",".join(["1"] * 25),
    "down_lr_weight": "linear", "mid_lr_weight": "1", "up_lr_weight": "sine", "block_lr_zero_threshold": "0.01",
    "conv_dim": "4", "conv_alpha": "1", "module_dropout": "0.1", "rank_dropout": "0.1", "unit": "2",
    "loraplus_lr_ratio": "4", "loraplus_unet_lr_ratio": "4", "loraplus_text_encoder_lr_ratio": "4",
    "enable_all_linear": "True", "enable_conv": "True",
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class DoubleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_attn, self.img_mlp = Attention(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def small_flux() -> nn.Module:
    return nn.ModuleDict({"double_blocks": nn.ModuleList([DoubleBlock(), DoubleBlock()])})


def unet() -> UNet:
    with torch.device("meta"):
        return UNet(TINY)


@pytest.mark.parametrize("module", ["networks.lora", "networks.lora_fa", "networks.dylora", "networks.oft"])
def test_every_recorded_argument_is_known(facts: Path, module: str) -> None:
    recorded = json.loads((facts / "training" / "network_args_keys.json").read_text(encoding="utf-8"))
    keys = next(keys for name, keys in recorded.items() if module in name.split(", "))
    assert keys
    network = importlib.import_module(module).create_network(
        1.0, 4, 1.0, None, [], unet(), **{key: VALUES[key] for key in keys}
    )
    assert len(network.unet_loras) > 100


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "oft_flux", "dylora", "lora_fa"])
def test_every_kind_goes_on_every_family(kind: str) -> None:
    module: Any = importlib.import_module(f"networks.{kind}")
    prefix = "oft_unet_" if kind.startswith("oft") else "lora_unet_"
    on_sd = module.create_network(1.0, 4, 1.0, None, [], unet())
    keys = list(on_sd.state_dict_for_saving())
    assert all(key.startswith((f"{prefix}down_blocks", f"{prefix}up_blocks", f"{prefix}mid_block")) for key in keys)
    on_flux = module.create_network(1.0, 4, 1.0, None, [], small_flux(), train_double_block_indices="1")
    names = {key.partition(".")[0] for key in on_flux.state_dict_for_saving()}
    attention = {f"{prefix}double_blocks_1_img_attn_{layer}" for layer in ("qkv", "proj")}
    mlp = {f"{prefix}double_blocks_1_img_mlp_{layer}" for layer in ("0", "2")}
    assert names == (attention if kind.startswith("oft") else attention | mlp)


def test_a_family_is_told_by_its_layers() -> None:
    t5 = nn.ModuleDict({"encoder": nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2)])})})
    clip = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(2, 2)})])})
    assert family_of(small_flux(), []) is lora_flux
    assert family_of(unet(), []) is lora
    assert family_of(nn.Module(), [clip, t5]) is lora_flux
    assert family_of(nn.Module(), [clip]) is lora
    with pytest.raises(ValueError, match="no layers that one of networks"):
        family_of(nn.Linear(2, 2), [])


def test_what_is_not_for_a_family_is_named() -> None:
    loha = importlib.import_module("networks.loha")
    with pytest.raises(ValueError, match="does not know 'split_qkv'"):
        loha.create_network(1.0, 4, 1.0, None, [], small_flux(), split_qkv="True")
    with pytest.raises(ValueError, match="does not know 'train_blocks'"):
        loha.create_network(1.0, 4, 1.0, None, [], unet(), train_blocks="all")
    dylora = importlib.import_module("networks.dylora")
    with pytest.raises(ValueError, match="unit=3: the rank 4 cannot be divided"):
        dylora.create_network(1.0, 4, 1.0, None, [], unet(), unit="3")
    with pytest.raises(ValueError, match="DyLoRA has one rank"):
        dylora.create_network(1.0, 4, 1.0, None, [], unet(), conv_dim="2")


def test_a_file_of_one_kind_is_not_loaded_into_another(tmp_path: Path) -> None:
    loha = importlib.import_module("networks.loha")
    made = loha.create_network(1.0, 4, 1.0, None, [], small_flux())
    made.save_weights(tmp_path / "loha.safetensors", None, None)
    network = lora_flux.create_network(1.0, 4, 1.0, None, [], small_flux())
    network.apply_to([], small_flux())
    with pytest.raises(ValueError, match=r"hada_w1_a.*choose the --network_module"):
        network.load_weights(tmp_path / "loha.safetensors")
    other = loha.create_network(1.0, 2, 1.0, None, [], small_flux())
    other.apply_to([], small_flux())
    with pytest.raises(ValueError, match="has rank 4 and the network has rank 2"):
        other.load_weights(tmp_path / "loha.safetensors")
