"""Pictures without and with a LoRA, on one sheet, of Stable Diffusion 1.x and of XL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import compare_lora
from demo_folder import DemoFolder
from demo_sdxl_folder import SdxlDemo
from library.files.weights import save_safetensors

WIDTH, PROMPT = 64, "one star --w 64 --h 64 --s 2 --d 1 --l 1"
LAYERS = {
    "sd": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2", 32),
    "sdxl": ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2", 64),
    "sdxl, names of diffusers": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2", 64),
}


@pytest.fixture(params=list(LAYERS))
def words(request: pytest.FixtureRequest, tmp_path: Path, small_sd: DemoFolder, small_sdxl: SdxlDemo) -> list[str]:
    """A command line with a LoRA on one layer of the U-Net."""
    name, width = LAYERS[request.param]
    demo: Any = small_sd if request.param == "sd" else small_sdxl
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_down.weight": (4, 4 * width), "lora_up.weight": (width, 4)}
    weights = {f"{name}.{end}": torch.randn(shape, generator=generator) for end, shape in shapes.items()}
    save_safetensors(weights, tmp_path / "lora.safetensors")
    (tmp_path / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--lora", str(tmp_path / "lora.safetensors"), "--prompts", str(tmp_path / "prompts.txt")),
        *("--output", str(tmp_path / "sheet.png")),
        *([] if request.param == "sd" else ["--sdxl"]),
    ]


def test_the_picture_with_the_lora_is_another_one(words: list[str], tmp_path: Path) -> None:
    assert compare_lora.main(words) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), dtype=float)
    start = next(row for row in range(len(sheet)) if (sheet[row] != sheet[0, 0]).any())
    row = sheet[start + WIDTH // 2]
    assert sheet.shape[1] >= 2 * WIDTH
    halves = row[: len(row) // 2], row[-(len(row) // 2) :]
    assert np.abs(halves[0] - halves[1]).mean() > 1


def test_what_does_not_fit_is_one_line(
    tmp_path: Path, small_sdxl: SdxlDemo, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    save_safetensors(
        {"lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors"
    )
    words = [
        *("--pretrained_model_name_or_path", str(small_sdxl.checkpoint), "--lora", str(tmp_path / "x.safetensors")),
        *("--tokenizer_cache_dir", str(small_sdxl.tokenizers), "--prompts", str(tmp_path / "prompts.txt")),
        *("--output", str(tmp_path / "sheet.png")),
    ]
    assert compare_lora.main([*words, "--sdxl"]) == 1
    assert "it is a LoRA for FLUX" in capsys.readouterr().err
    assert compare_lora.main(words) == 1
    assert "is a Stable Diffusion XL model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_lora.main([*words, "--sdxl", "--v2"])
