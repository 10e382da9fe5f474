"""Published layouts of Stable Diffusion XL load, whole and into place; everything else is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo_folder import DemoFolder
from demo_sdxl_folder import SdxlDemo
from library.files.weights import save_safetensors
from library.models.sdxl import checkpoint
from library.models.sdxl.checkpoint import load_text_encoders, load_unet
from library.models.vae.sd import load_vae
from tests.library.models.sd.manifests import manifest, without_weights

CPU, META = torch.device("cpu"), torch.device("meta")
F32 = torch.float32
FOLDER = {
    "unet/diffusion_pytorch_model": "sdxl_diffusers_unet",
    "vae/diffusion_pytorch_model": "sdxl_diffusers_vae",
    "text_encoder/model": "sdxl_diffusers_text_encoder",
    "text_encoder_2/model": "sdxl_diffusers_text_encoder_2",
}


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> dict[Path, dict[str, Any]]:
    return without_weights(monkeypatch, checkpoint)


def check_published(path: Path) -> None:
    unet = load_unet(path, F32, META)
    shape = unet.shape
    assert (shape.widths, shape.depths, shape.mid_depth) == ((320, 640, 1280), (0, 2, 10), 10)
    assert (shape.context_dim, shape.vector_dim, shape.layers_per_level) == (2048, 2816, 2)
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    first, second = load_text_encoders(path, 49407, F32, META)
    assert (first.config.num_hidden_layers, first.config.hidden_act) == (12, "quick_gelu")
    config = second.text_model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_act) == (32, 20, "gelu")
    assert second.text_projection.shape == (1280, 1280)
    assert tuple(load_vae(path, "sdxl", "--vae", F32, META).config.block_out_channels) == (128, 256, 512, 512)


@pytest.mark.parametrize("optional", [True, False])
def test_the_published_file_loads_with_nothing_missing_or_left_over(
    facts: Path, weightless: dict[Path, dict[str, Any]], optional: bool
) -> None:
    path = Path("sd_xl_base_1.0.safetensors")
    weightless[path] = manifest(facts, "sdxl_base", optional)
    check_published(path)


def test_a_folder_of_diffusers_loads_with_nothing_missing_or_left_over(
    facts: Path, weightless: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for name, keys in FOLDER.items():
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir()
        file.touch()
        weightless[file] = manifest(facts, keys)
    check_published(tmp_path)


def test_the_projection_of_a_folder_is_turned_into_that_of_the_file(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    tensors = load_file(small_sdxl.checkpoint)
    key = "conditioner.embedders.1.model.text_projection"
    tensors[f"{key}.weight"] = tensors.pop(key).t().contiguous()
    save_safetensors(tensors, tmp_path / "linear.safetensors", {})
    ids = torch.tensor([[1, 5, 7, 99] + [0] * 73])
    answers = [
        load_text_encoders(path, 99, F32, CPU)[1](ids)[1]
        for path in (small_sdxl.checkpoint, tmp_path / "linear.safetensors")
    ]
    torch.testing.assert_close(*answers)


def without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("first_stage_model."), "holds no autoencoder; give one with --vae"),
        (without("conditioner.embedders.1.model.text_projection"), "text_projection is missing"),
        (without("model.diffusion_model.label_emb.0.2.bias"), r"label_emb\.0\.2\.bias"),
        (without("conditioner.embedders.0."), "changed"),
        (without("model.diffusion_model."), "changed"),
    ],
    ids=["no VAE", "no projection", "no bias", "no CLIP-L", "no U-Net"],
)
def test_what_is_missing_is_named_with_the_file(
    small_sdxl: SdxlDemo, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    path = tmp_path / "changed.safetensors"
    save_safetensors(change(load_file(small_sdxl.checkpoint)), path, {})
    with pytest.raises(ValueError, match=said) as error:
        load_unet(path, F32, META)
        load_text_encoders(path, 99, F32, META)
        load_vae(path, "sdxl", "--pretrained_model_name_or_path", F32, META)
    assert "changed.safetensors" in str(error.value)


def test_files_of_other_kinds_are_refused_by_name(small_sdxl: SdxlDemo, small_sd: DemoFolder, tmp_path: Path) -> None:
    lora = {"lora_unet_middle_block_0_in_layers_2.lora_down.weight": torch.zeros(4, 64, 3, 3)}
    save_safetensors(lora, tmp_path / "lora.safetensors", {})
    (tmp_path / "half.safetensors").write_bytes(small_sdxl.checkpoint.read_bytes()[:-1000])
    wide = load_file(small_sdxl.checkpoint)
    wide["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_safetensors(wide, tmp_path / "inpainting.safetensors", {})
    for path, said in (
        (small_sd.checkpoint, r"is a Stable Diffusion model.*train_network\.py"),
        (tmp_path / "lora.safetensors", r"lora\.safetensors is .*(LoRA|network)"),
        (tmp_path / "half.safetensors", r"half\.safetensors"),
        (tmp_path / "inpainting.safetensors", "9 input channels where Stable Diffusion XL takes 4"),
    ):
        with pytest.raises(ValueError) as error:
            load_unet(path, F32, CPU)
        assert re.search(said, str(error.value)), error.value
