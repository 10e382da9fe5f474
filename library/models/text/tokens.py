"""Prompts of any length -> rows of token ids that a CLIP text encoder can read.

CLIP reads 77 ids at a time: a start mark, 75 words, an end mark. A longer prompt becomes several such rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from library.files.hub import download
from library.models.text.prompt_weights import parse_weights

logger = logging.getLogger(__name__)

V1_TOKENIZER = ("openai/clip-vit-large-patch14", "")
V2_TOKENIZER = ("stabilityai/stable-diffusion-2", "tokenizer")
"""The tokenizers of Stable Diffusion 1.x and 2.x: hub id, and the subfolder in it."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer of the transformers library."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    model_max_length: int

    def __call__(self, text: str, *, add_special_tokens: bool, truncation: bool, verbose: bool) -> Any:
        """Something whose `input_ids` are the ids of `text`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        ...


@dataclass(frozen=True)
class TokenRows:
    """Prompts as the text encoder takes them."""

    ids: Tensor
    """int64 [B, rows, 77]"""
    weights: Tensor
    """float32 [B, rows, 77], 1 for every mark and padding."""


def tokenize_rows(
    tokenizer: Tokenizer, prompts: Sequence[str], max_rows: int, min_rows: int = 1, weighted: bool = False
) -> TokenRows:
    """Cut `prompts` into rows, all into the same number: as many as the longest needs, `max_rows` at most.

    With `weighted`, brackets are read as weights (see `parse_weights`); without, they are text. Words beyond the last
    row are dropped.
    """
    words = [_words(tokenizer, prompt, weighted) for prompt in prompts]
    inner = tokenizer.model_max_length - 2
    needed = max((math.ceil(len(ids) / inner) for ids, _ in words), default=1)
    count = min(max_rows, max(min_rows, needed))
    rows = [_rows(tokenizer, ids, count) for ids, _ in words]
    weights = [_weight_rows(values, inner, count) for _, values in words]
    return TokenRows(torch.tensor(rows, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32))


def without_padding(rows: TokenRows, end_mark: int) -> TokenRows:
    """Single rows [B, 1, 77] cut to the longest of them: [B, 1, L], with L words and both marks of it."""
    length = int((rows.ids == end_mark).int().argmax(-1).max()) + 1
    return TokenRows(rows.ids[..., :length], rows.weights[..., :length])


def count_tokens(tokenizer: Tokenizer, prompt: str, room: int, weighted: bool = False) -> tuple[int, str]:
    """How many tokens `prompt` has without marks, and the text of those beyond the first `room`."""
    ids, _ = _words(tokenizer, prompt, weighted)
    return len(ids), tokenizer.decode(ids[room:]).strip() if len(ids) > room else ""


@dataclass(frozen=True)
class TokenizerKind:
    """What a tokenizer's files are, and the class of transformers that reads them."""

    title: str
    reader: Any
    vocabulary: tuple[str, ...]
    """The files it is made of, unless they are in one, tokenizer.json."""
    folder: str = "tokenizer"
    """Where it lies in a model's folder."""

    def in_folder(self, folder: str) -> TokenizerKind:
        """The same kind, for a model's folder that has it in `folder`."""
        return replace(self, folder=folder)

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are fetched."""
        return (*self.vocabulary, "tokenizer_config.json", "special_tokens_map.json")


CLIP = TokenizerKind("CLIP", CLIPTokenizer, ("vocab.json", "merges.txt"))


def row_lengths(mask: Tensor) -> tuple[int, ...]:
    """How many ones each row of `mask` [B, T] has; all T in a mask without content, as memory is estimated with.

    Waits for the device of `mask`, unless that is the CPU.
    """
    if mask.is_meta or isinstance(mask, FakeTensor):
        return (mask.shape[1],) * len(mask)
    return tuple(int(count) for count in mask.sum(dim=1).tolist())


def load_tokenizer(
    hub_id: str,
    subfolder: str,
    cache_folder: str | None,
    model_folder: Path | None = None,
    kind: TokenizerKind = CLIP,
) -> Any:
    """A tokenizer from `<cache_folder>/<hub_id with / as _>`, else the model's own folder, else the hub.

    One fetched from the hub is kept in the cache folder, if there is one.

    Raises:
        ValueError: it is in none of these places; names them.
    """
    cached = Path(cache_folder) / hub_id.replace("/", "_") if cache_folder else None
    own = model_folder / kind.folder if model_folder else None
    for folder in (cached, own):
        if folder is not None and folder.is_dir():
            return _read_tokenizer(folder, kind)
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in kind.files]
    try:
        fetched = download(hub_id, lambda files: [name for name in files if name in wanted], "--tokenizer_cache_dir")
    except ValueError as error:
        place = cached or f"<a folder given with --tokenizer_cache_dir>/{hub_id.replace('/', '_')}"
        raise ValueError(
            f"The tokenizer {hub_id} cannot be fetched from the model hub. Connect to the network once, or put its "
            f"files ({', '.join(kind.files)}) into {place}"
        ) from error
    tokenizer = _read_tokenizer(fetched / subfolder, kind)
    if cached is not None:
        tokenizer.save_pretrained(cached)
        logger.info("kept the tokenizer %s in %s", hub_id, cached)
    return tokenizer


def _read_tokenizer(folder: Path, kind: TokenizerKind) -> Any:
    # Without its files, the tokenizer class makes an empty vocabulary and says nothing.
    complete = (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in kind.vocabulary)
    if not complete:
        raise ValueError(f"{folder} holds no tokenizer: {' and '.join(kind.vocabulary)}, or tokenizer.json, are needed")
    try:
        return kind.reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the readers raise whatever they come upon in a broken file
        raise ValueError(f"{folder} holds no {kind.title} tokenizer that can be read: {error}") from error


def _words(tokenizer: Tokenizer, prompt: str, weighted: bool) -> tuple[list[int], list[float]]:
    """The ids of a prompt without marks, and a weight for each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_weights(prompt) if weighted else [(prompt, 1.0)]:
        piece = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids.extend(piece)
        weights.extend([weight] * len(piece))
    return ids, weights


def _rows(tokenizer: Tokenizer, ids: list[int], count: int) -> list[list[int]]:
    """`count` rows: each a start mark, its words and whatever follows them in the padded sequence.

    Where padding is not the end mark (2.x), a row that is full of words ends in an end mark, a row without words has
    one after its start mark, and the others end in padding.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    inner = tokenizer.model_max_length - 2
    room = inner * count
    line = [bos, *ids[:room], eos]
    line += [pad] * (room + 2 - len(line))
    rows = []
    for start in range(0, room, inner):
        row = [bos, *line[start + 1 : start + inner + 2]]
        if pad == eos or row[-1] != pad:
            row[-1] = eos
        if pad != eos and row[1] == pad:
            row[1] = eos
        rows.append(row)
    return rows


def _weight_rows(weights: list[float], inner: int, count: int) -> list[list[float]]:
    padded = weights[: inner * count] + [1.0] * (inner * count - len(weights))
    return [[1.0, *padded[start : start + inner], 1.0] for start in range(0, inner * count, inner)]
