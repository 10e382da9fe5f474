"""Is the small SDXL model what its name says, and is everything there?"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from demo_sdxl_folder import BIGG_FOLDER, SdxlDemo, write_sdxl_demo
from demo_sdxl_weights import CLIP, OPENCLIP, SdxlSizes, sdxl_shapes
from library.generation.prompt_line import read_prompts
from tests.tools.test_demo_folder import load_manifest


def test_names_and_shapes_are_those_of_the_published_checkpoint(facts: Path) -> None:
    published = load_manifest(facts / "checkpoints" / "sdxl_base.json")
    full_size = SdxlSizes(
        unet=(320, 640, 1280),
        depths=(0, 2, 10),
        clip=768,
        clip_layers=12,
        openclip=1280,
        openclip_layers=32,
        vocabulary=49408,
        vae=128,
    )
    ours = sdxl_shapes(full_size)
    ours |= {f"{CLIP}text_model.embeddings.position_ids": (1, 77), f"{OPENCLIP}logit_scale": ()}
    # The published VAE widens on its way down, ours does not: equal widths need no shortcut.
    vae = {key for key in published if key.startswith("first_stage_model.")}
    assert {key for key in ours if key.startswith("first_stage")} == {key for key in vae if "nin_shortcut" not in key}
    assert {key: ours[key] for key in ours.keys() - vae} == {key: published[key] for key in published.keys() - vae}


def test_the_model_is_small_and_the_same_every_time(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    assert small_sdxl.checkpoint.stat().st_size < 20e6
    again = write_sdxl_demo(tmp_path)
    first, second = load_file(small_sdxl.checkpoint), load_file(again.checkpoint)
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_second_tokenizer_fills_up_with_zeros(small_sdxl: SdxlDemo) -> None:
    ids = {}
    for folder in ("openai_clip-vit-large-patch14", BIGG_FOLDER):
        tokenizer = CLIPTokenizer.from_pretrained(str(small_sdxl.tokenizers / folder))
        ids[folder] = tokenizer("one orange circle", padding="max_length").input_ids
        assert len(ids[folder]) == 77
    first, second = ids.values()
    assert first[:5] == second[:5] and set(first[4:]) == {first[4]} and set(second[5:]) == {0}


def test_prompts_and_pictures_are_there(small_sdxl: SdxlDemo) -> None:
    first, second = read_prompts(small_sdxl.prompts)
    assert (first.scale, first.steps, second.width, second.negative_prompt) == (3.0, 4, 96, "red")
    assert len(list(small_sdxl.pictures.glob("*.png"))) == 12 and small_sdxl.dataset.is_file()
