"""Keys of a file say what is in it."""

from __future__ import annotations

import pytest
import torch

from networks.core.key_names import AdapterShape, adapter_name, adapter_shapes, check_known, clip_path


def test_names_are_paths_with_underscores() -> None:
    assert adapter_name("lora_unet", "mid_block.attentions.0.proj_in") == "lora_unet_mid_block_attentions_0_proj_in"


def test_text_encoder_names_always_have_the_level_text_model() -> None:
    with_level, without = "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"
    assert clip_path(with_level) == clip_path(without) == with_level


def test_rank_and_alpha_come_from_the_tensors() -> None:
    weights = {
        "a.lora_down.weight": torch.zeros(3, 8),
        "a.alpha": torch.tensor(1.5),
        "b.lora_down.weight": torch.zeros(2, 8, 1, 1),
        "b.lora_up.weight": torch.zeros(8, 2, 1, 1),
        "c.lora_down.weight": torch.zeros(4, 8),
        "c.alpha": torch.tensor(0),
    }
    expected = {"a": AdapterShape(3, 1.5), "b": AdapterShape(2, 2.0), "c": AdapterShape(4, 4.0)}
    assert adapter_shapes(weights) == expected


def test_keys_that_belong_to_no_layer_are_found() -> None:
    assert check_known(["a.alpha", "b.alpha", "b.lora_up.weight"], ["a"], "f") == ["b.alpha", "b.lora_up.weight"]
    assert check_known([], ["a"], "f") == []


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "PEFT or diffusers"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.oft_diag", "LyCORIS"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "SDXL"),
        ("model.diffusion_model.out.2.weight", "a model, not a LoRA"),
        ("something.else", "its keys are unknown"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(key: str, meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning) as error:
        check_known([key], ["lora_unet_mid_block"], "other.safetensors")
    assert "other.safetensors" in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "own", "dialect"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_input_blocks_4_1_proj_in", "FLUX"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_double_blocks_0_img_attn_qkv", "SDXL"),
        ("oft_unet_double_blocks_0_img_attn_qkv", "oft_unet_input_blocks_4_1_proj_in", "unknown"),
    ],
)
def test_a_file_of_another_family_is_refused_though_both_have_one_text_encoder(
    theirs: str, own: str, dialect: str
) -> None:
    shared = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    found = [f"{shared}.lora_up.weight", f"{theirs}.lora_up.weight"]
    with pytest.raises(ValueError, match=f"other.safetensors: only layers of text encoders.*{dialect}.*{theirs}"):
        check_known(found, [shared, own], "other.safetensors")
    assert check_known([f"{shared}.alpha", f"{own}.alpha", f"{theirs}.alpha"], [shared, own], "f") == [
        f"{theirs}.alpha"
    ]
    assert check_known([f"{shared}.alpha"], [shared, own], "f") == []
