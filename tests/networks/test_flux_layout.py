"""Both programs' names of a layer are those by which the model's own loader knows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.models.flux.layout import published_name
from networks.core.key_names import adapter_name
from networks.core.lora_file import LoraFile
from networks.flux_layout import BLOCKS, ENDS, FAMILIES, is_flux_name, lora_family, model_family


def test_names_of_blocks_agree_with_the_loader_of_models() -> None:
    for ours, (theirs, layers) in BLOCKS.items():
        for our_layer, parts in layers.items():
            for place, part in enumerate(parts):
                published = published_name(f"{theirs}.3.{part}.weight")
                assert published is not None
                path, at = published
                assert adapter_name("lora_unet", path.removesuffix(".weight")) == f"lora_unet_{ours}_3_{our_layer}"
                assert at == place


def test_names_before_the_blocks_agree_with_the_loader_of_models() -> None:
    for ours, theirs in ENDS.items():
        published = published_name(f"{theirs}.weight")
        assert published is not None and published[0].removesuffix(".weight").replace(".", "_") == ours


@pytest.mark.parametrize(
    "file", ["flux_lora", "flux_lora_in_dims", "flux_lora_split_qkv", "flux_lora_te", "chroma_lora"]
)
def test_every_recorded_name_is_known(facts: Path, file: str) -> None:
    keys = json.loads((facts / "lora_keys" / f"{file}.json").read_text(encoding="utf-8"))["keys"]
    assert all(is_flux_name(key.partition(".")[0]) for key in keys)


def test_names_of_other_families_are_not_known() -> None:
    for name in ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_double_blocks_0_img_attn_q", "lora_te2_text_model_x"):
        assert not is_flux_name(name)


@pytest.mark.parametrize(
    ("key", "family"),
    [("guidance_in.in_layer.weight", "dev"), ("img_in.weight", "schnell"), ("distilled_guidance_layer.x", "chroma")],
)
def test_the_kind_of_model_is_told_by_its_keys(key: str, family: str) -> None:
    assert model_family(["double_blocks.0.img_attn.qkv.weight", key], "file") is FAMILIES[family]


def test_folders_of_diffusers_and_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="convert_diffusers_to_flux"):
        model_family(["transformer_blocks.0.attn.to_q.weight"], "file")
    with pytest.raises(ValueError, match="no FLUX.1 and no Chroma"):
        model_family(["down_blocks.0.weight"], "file")


def test_a_lora_says_what_it_is_for() -> None:
    assert lora_family([LoraFile("a", {}, {"ss_base_model_version": "chroma"})]) is FAMILIES["chroma"]
    assert lora_family([LoraFile("a", {}, {"modelspec.architecture": "flux-1-schnell/lora"})]) is FAMILIES["schnell"]
    assert lora_family([LoraFile("a", {}, {})]) is FAMILIES["dev"]
