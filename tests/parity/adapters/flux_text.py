"""Runs the case of CLIP-L and T5 as FLUX.1 uses them, each from a file of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.files.weights import open_weights, save_safetensors
from library.models.flux.text import pooled_state
from library.models.text.clip import TextEncoder, build_text_encoder, clip_sources
from library.models.text.t5 import T5Encoder, build_t5, t5_sources


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    config, inputs, seed = case["config"], case["inputs"], case["seed"]
    vocabulary = config["clip"]["vocab_size"]
    clip_ids = drawn(inputs["l_tokens"], "l_tokens", recipe, seed)
    for row, length in enumerate(inputs["l_lengths"]["value"]):
        clip_ids[row, length:] = vocabulary - 1
    t5_ids = drawn(inputs["t5_tokens"], "t5_tokens", recipe, seed)
    mask = torch.zeros_like(t5_ids)
    for row, length in enumerate(inputs["t5_lengths"]["value"]):
        t5_ids[row, length - 1] = 1
        t5_ids[row, length:] = 0
        mask[row, :length] = 1
    with tempfile.TemporaryDirectory() as folder:
        t5 = load_t5(Path(folder), case, recipe)
        # The recording ran CLIP-L with a plain GELU, which the published model does not have; both were recorded.
        erf = load_clip(Path(folder), case, recipe, "gelu")
        quick = load_clip(Path(folder), case, recipe, "quick_gelu")
    return {
        "l_pooled": pooled_state(erf(clip_ids), clip_ids),
        "l_pooled_quick_gelu": pooled_state(quick(clip_ids), clip_ids),
        "clip_last_hidden": erf(clip_ids)[:, ::7],
        "t5_out_nomask": t5(t5_ids),
        "t5_out_masked": t5(t5_ids, mask),
    }


def drawn(entry: dict[str, Any], name: str, recipe: ModuleType, seed: str) -> Tensor:
    ids: Tensor = recipe.token_ids(name, entry["shape"], entry["low"], entry["high"], seed)
    return ids


def load_t5(folder: Path, case: dict[str, Any], recipe: ModuleType) -> T5Encoder:
    file = folder / "t5.safetensors"
    weights = recipe.state_dict(case["checkpoint"], case["seed"])
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    for key in weights:
        if key.endswith("SelfAttention.q.weight"):
            weights[key] = weights[key] * 0.125
    save_safetensors(weights, file)
    with open_weights(file) as opened:
        return build_t5(t5_sources(opened), torch.float32, "cpu")


def load_clip(folder: Path, case: dict[str, Any], recipe: ModuleType, activation: str) -> TextEncoder:
    file = folder / f"{activation}.safetensors"
    save_safetensors(recipe.state_dict(case["clip_checkpoint"], case["seed"]), file)
    heads = {"num_attention_heads": case["config"]["clip_heads"]}
    with open_weights(file) as opened:
        return build_text_encoder(clip_sources(opened), activation, torch.float32, "cpu", heads)
