"""Is the demo folder what the published formats say?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from demo_checkpoint import Sizes, small_checkpoint, text_shapes, unet_shapes, vae_shapes
from demo_folder import DemoFolder, write_demo


def test_names_and_shapes_are_those_of_the_published_checkpoint(facts: Path) -> None:
    published = load_manifest(facts / "checkpoints" / "sd15.json")
    full_size = Sizes(unet=(320, 640, 1280, 1280), text=768, text_layers=12, vocabulary=49408, vae=128)
    ours = {**unet_shapes(full_size), **text_shapes(full_size)}
    ours["cond_stage_model.transformer.text_model.embeddings.position_ids"] = (1, 77)
    theirs = {key: shape for key, shape in published.items() if not key.startswith("first_stage_model.")}
    assert ours == theirs
    # Equal widths need no shortcut; everything else of the VAE is there.
    vae = {key for key in published if key.startswith("first_stage_model.") and "nin_shortcut" not in key}
    assert set(vae_shapes(full_size)) == vae


def test_the_checkpoint_is_small_and_the_same_every_time(small_sd: DemoFolder) -> None:
    assert small_sd.checkpoint.stat().st_size < 30e6
    written = load_file(small_sd.checkpoint)
    rows = written["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].shape[0]
    again = small_checkpoint(Sizes(vocabulary=rows))
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


def test_the_tokenizer_knows_the_words_of_the_captions(small_sd: DemoFolder) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(str(small_sd.tokenizers / "openai_clip-vit-large-patch14"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Drawing, one orange circle").input_ids)
    words = ["drawing</w>", ",</w>", "one</w>", "orange</w>", "circle</w>"]
    assert tokens == ["<|startoftext|>", *words, "<|endoftext|>"]
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_every_picture_has_a_caption_and_shapes_vary(small_sd: DemoFolder) -> None:
    pictures = sorted(small_sd.pictures.glob("*.png"))
    sizes = [Image.open(path).size for path in pictures]
    assert len(pictures) == 12
    assert {size: sizes.count(size) for size in set(sizes)} == {(192, 192): 4, (160, 320): 4, (320, 160): 4}
    assert all(path.with_suffix(".txt").read_text(encoding="utf-8").startswith("drawing, one ") for path in pictures)


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        return {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}

    write_demo(tmp_path)
    first = contents()
    write_demo(tmp_path)
    assert contents() == first


def load_manifest(path: Path) -> dict[str, tuple[int, ...]]:
    keys = json.loads(path.read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, (shape, _) in keys.items()}
