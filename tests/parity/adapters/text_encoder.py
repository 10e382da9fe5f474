"""Runs the cases of the CLIP text encoders: cutting into rows, clip skip, weighted captions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.files.weights import open_weights, save_safetensors
from library.models.sd.checkpoint import CLIP_PREFIX, OPENCLIP_LAYERS, OPENCLIP_PREFIX
from library.models.text.clip import TextEncoder, build_text_encoder, clip_sources, encode_caption, openclip_sources
from library.models.text.tokens import tokenize_rows


@dataclass
class WordIds:
    """A tokenizer for texts that are already ids, separated by blanks."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    model_max_length: int = 77

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    tokenizer = WordIds(config["bos_token_id"], config["eos_token_id"], config["pad_token_id"])
    encoder = load(case, recipe)
    prompts, weighted = texts_of(case, recipe)
    outputs = {}
    for length in (75, 150, 225):
        outputs[f"tokens_{length}"] = rows_of(tokenizer, prompts, length).ids
    for length in (75, 225):
        for skip in (1, 2):
            ids = outputs[f"tokens_{length}"]
            outputs[f"hidden_skip{skip}_{length}"] = encode_caption(encoder, ids, None, skip)
        rows = rows_of(tokenizer, weighted, length, weighted=True)
        assert torch.equal(rows.ids, outputs[f"tokens_{length}"])
        outputs[f"weights_{length}"] = rows.weights
        outputs[f"hidden_weighted_{length}"] = encode_caption(encoder, rows.ids, rows.weights)
    return outputs


def texts_of(case: dict[str, Any], recipe: ModuleType) -> tuple[list[str], list[str]]:
    """The prompts as words that are ids, plain and with weights in brackets."""
    drawn, inputs = case["inputs"]["prompts"], case["inputs"]
    ids = recipe.token_ids("prompts", drawn["shape"], drawn["low"], drawn["high"], case["seed"])
    factors = recipe.tensor("word_weights", inputs["word_weights"]["shape"], case["seed"])
    prompts, weighted = [], []
    for row, numbers, length in zip(ids.tolist(), factors.tolist(), inputs["prompt_lengths"]["value"]):
        prompts.append(" ".join(str(word) for word in row[:length]))
        pairs = zip(row[:length], numbers[:length])
        weighted.append(" ".join(f"({word}:{round(0.5 + 0.5 * abs(n), 4)})" for word, n in pairs))
    return prompts, weighted


def rows_of(tokenizer: WordIds, prompts: Sequence[str], length: int, weighted: bool = False) -> Any:
    return tokenize_rows(tokenizer, prompts, max_rows=length // 75, min_rows=length // 75, weighted=weighted)


def load(case: dict[str, Any], recipe: ModuleType) -> TextEncoder:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_safetensors(recipe.state_dict(case["checkpoint"], case["seed"]), path)
        with open_weights(path) as file:
            if any(key.startswith(OPENCLIP_PREFIX) for key in file.keys()):
                sources, activation = openclip_sources(file, OPENCLIP_PREFIX, OPENCLIP_LAYERS), "gelu"
            else:
                sources, activation = clip_sources(file, CLIP_PREFIX), "quick_gelu"
            return build_text_encoder(sources, activation, torch.float32, "cpu")
