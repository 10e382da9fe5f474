"""A converted LoRA does in the other program what it did in the first."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from networks import convert_flux_lora
from tests.networks.lora_files import CLIP, HIDDEN, LAYERS, MLP, T5, effects, lora, save


def convert(source: Path, src: str, dst: str) -> dict[str, Tensor]:
    target = source.with_name(f"{dst}.safetensors")
    words = ["--src", src, "--dst", dst, "--src_path", str(source), "--dst_path", str(target)]
    assert convert_flux_lora.main(words) == 0
    return load_file(target)


def refused(caplog: pytest.LogCaptureFixture, *words: str) -> str:
    caplog.clear()
    assert convert_flux_lora.main(list(words)) == 1
    return caplog.messages[-1]


def test_sizes_are_read_from_the_file_and_parts_have_the_effect_of_their_rows(tmp_path: Path) -> None:
    whole = lora(alpha=1.0)
    theirs = convert(save(tmp_path, "ours", whole), "sd-scripts", "diffusers")
    block = "transformer.single_transformer_blocks.0"
    rows = 0
    for part, size in {"attn.to_q": HIDDEN, "attn.to_k": HIDDEN, "attn.to_v": HIDDEN, "proj_mlp": MLP}.items():
        down, up = theirs[f"{block}.{part}.lora_A.weight"], theirs[f"{block}.{part}.lora_B.weight"]
        expected = effects(whole)["lora_unet_single_blocks_0_linear1"][rows : rows + size]
        assert torch.allclose(up @ down, expected, atol=1e-6)
        rows += size
    assert "transformer.x_embedder.lora_A.weight" in theirs
    assert not [key for key in theirs if key.endswith("alpha")]


@pytest.mark.parametrize("alpha", [0.25, 2.0, 16.0])
def test_there_and_back_is_the_same_effect_and_the_same_rank(tmp_path: Path, alpha: float) -> None:
    whole = lora(alpha=alpha) | lora(CLIP, "lora_te1", alpha=alpha)
    convert(save(tmp_path, "ours", whole), "sd-scripts", "diffusers")
    back = convert(tmp_path / "diffusers.safetensors", "diffusers", "sd-scripts")
    assert back.keys() == whole.keys()
    for name, effect in effects(whole).items():
        assert torch.allclose(effects(back)[name], effect, atol=1e-5), name
        assert back[f"{name}.lora_down.weight"].shape == whole[f"{name}.lora_down.weight"].shape


def test_layers_that_the_file_lacks_have_no_effect(tmp_path: Path) -> None:
    parts = {
        "transformer.single_transformer_blocks.0.proj_mlp": (MLP, HIDDEN),
        "transformer.transformer_blocks.0.attn.to_k": (HIDDEN, HIDDEN),
    }
    tensors = {}
    for path, (rows, columns) in parts.items():
        tensors |= {f"{path}.lora_A.weight": torch.ones(2, columns), f"{path}.lora_B.weight": torch.ones(rows, 2)}
    ours = effects(convert(save(tmp_path, "theirs", tensors), "ai-toolkit", "sd-scripts"))
    fused, qkv = ours["lora_unet_single_blocks_0_linear1"], ours["lora_unet_double_blocks_0_img_attn_qkv"]
    assert fused.shape == (3 * HIDDEN + MLP, HIDDEN) and qkv.shape == (3 * HIDDEN, HIDDEN)
    assert fused[: 3 * HIDDEN].abs().max() == 0 and bool((fused[3 * HIDDEN :] == 2).all())
    assert bool((qkv[HIDDEN : 2 * HIDDEN] == 2).all()) and qkv.sum() == 2 * HIDDEN * HIDDEN


def test_alpha_in_peft_s_metadata_counts_once(tmp_path: Path) -> None:
    path = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)}
    settings = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6}', "note": "kept"}
    ours = effects(convert(save(tmp_path, "theirs", tensors, settings), "diffusers", "sd-scripts"))
    assert bool((ours["lora_unet_double_blocks_0_img_attn_proj"] == 6).all())
    with safe_open(tmp_path / "sd-scripts.safetensors", "pt") as file:
        assert file.metadata() == {"note": "kept"}


def test_names_of_single_files_under_the_prefix_of_comfyui_are_read(tmp_path: Path) -> None:
    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(24, 2)}
    ours = effects(convert(save(tmp_path, "theirs", tensors), "diffusers", "sd-scripts"))
    assert list(ours) == ["lora_unet_double_blocks_0_img_attn_qkv"]


def test_adapters_of_t5_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(tmp_path, "ours", lora() | lora(T5, "lora_te3"))
    with caplog.at_level(logging.WARNING):
        theirs = convert(source, "sd-scripts", "diffusers")
    assert not any("SelfAttention" in key for key in theirs)
    assert "1 adapters of T5-XXL are left out" in caplog.text and "lora_te3_encoder_block_0" in caplog.text


def test_nonsense_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = str(save(tmp_path, "ours", lora()))
    out = ["--dst_path", str(tmp_path / "out.safetensors")]
    ahead = ["--src", "sd-scripts", "--dst", "diffusers"]
    sdxl = lora({"input_blocks.4.1.proj_in": (8, 8)})
    assert "it is a LoRA for SDXL" in refused(caplog, *ahead, "--src_path", str(save(tmp_path, "x", sdxl)), *out)
    assert "is in the layout of sd-scripts" in refused(caplog, "--src_path", ours, *out)
    assert "are one layout" in refused(caplog, "--src", "diffusers", "--dst", "ai-toolkit", "--src_path", ours, *out)
    assert "did you mean diffusers?" in refused(caplog, "--src", "difusers", "--src_path", ours, *out)
    assert "--src_path is missing" in refused(caplog, *ahead, *out)
    assert "--dst_path is missing" in refused(caplog, *ahead, "--src_path", ours)
    assert "no such file" in refused(caplog, *ahead, "--src_path", str(tmp_path / "absent.safetensors"), *out)
    odd = lora({"single_blocks.0.linear1": (23, 8)})
    message = refused(caplog, *ahead, "--src_path", str(save(tmp_path, "odd", odd)), *out)
    assert "has 23 rows, which are not q, k, v and an MLP" in message
    (tmp_path / "cut.safetensors").write_bytes(Path(ours).read_bytes()[:-9])
    assert "is cut short" in refused(caplog, *ahead, "--src_path", str(tmp_path / "cut.safetensors"), *out)
    assert not (tmp_path / "out.safetensors").exists()


def test_parts_that_do_not_fit_together_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {}
    for part, rows in {"to_q": 8, "to_k": 9}.items():
        path = f"transformer.transformer_blocks.0.attn.{part}"
        tensors |= {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(rows, 2)}
    words = ["--src_path", str(save(tmp_path, "theirs", tensors)), "--dst_path", str(tmp_path / "out.safetensors")]
    assert "attn.to_k of transformer_blocks.0 has 9 rows, expected 8" in refused(caplog, *words)


def test_a_layer_of_another_width_is_told_by_the_second_layer(tmp_path: Path) -> None:
    # An MLP of twice the width, where q, k, v and MLP are 3 + 2 times it.
    layers = {"single_blocks.0.linear1": (3 * 7 + 14, 7), "single_blocks.0.linear2": (7, 7 + 14)}
    theirs = convert(save(tmp_path, "ours", lora(layers)), "sd-scripts", "diffusers")
    assert len(theirs["transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"]) == 14
    assert LAYERS["single_blocks.0.linear2"] == (HIDDEN, HIDDEN + MLP)
