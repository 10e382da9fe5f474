"""What does a small CLIP tokenizer consist of? A vocabulary and merges for a few words, over all bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

FOLDER = "openai_clip-vit-large-patch14"
"""The name under which Stable Diffusion 1.x looks in --tokenizer_cache_dir."""

WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
FIRST = "!"
"""The token with the id 0."""


def write_tokenizer(folder: Path, words: Iterable[str], padding: str = END) -> int:
    """Write the files that `CLIPTokenizer.from_pretrained(folder)` reads and return the size of the vocabulary.

    Each of `words` (lower case) becomes one token; anything else is spelled in bytes. Short texts are filled up with
    the token `padding`.
    """
    merges = _merges(words)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": padding,
        "model_max_length": 77,
        "do_lower_case": True,
    }
    vocabulary = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    return len(tokens)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs that join a word's letters from left to right, each pair once."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + WORD_END]
        joined = letters[0]
        for letter in letters[1:]:
            merges[joined, letter] = None
            joined += letter
    return list(merges)
