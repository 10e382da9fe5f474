"""The T5 text encoder of FLUX.1 and Chroma: built to the shapes of its weights, and how captions become its tokens.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", https://arxiv.org/abs/1910.10683;
version 1.1 with gated GELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from library.files.sources import Source, fill_module
from library.files.weights import WeightFile
from library.models.text.tokens import TokenizerKind

T5_TOKENIZER = "google/t5-v1_1-xxl"
T5_KIND = TokenizerKind("T5", T5Tokenizer, ("spiece.model",), folder="tokenizer_2")
END, PADDING = 1, 0
"""Tokens of every T5 vocabulary."""


class T5Encoder(nn.Module):
    """T5's encoder; modules are named as in transformers' T5EncoderModel and in the published files."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)
        # The stack's own copy of the same table, which files hold a second time.
        del self.encoder.embed_tokens

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids [B, T] -> [B, T, D]; where `mask` [B, T] is 0, nothing is attended to."""
        hidden = self.shared(input_ids)
        hides = None
        if mask is not None:
            hides = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(mask == 0, torch.finfo(hidden.dtype).min)
            hides = hides[:, None, None]  # [B, 1, 1, T]
        bias = None
        for block in self.encoder.block:
            hidden, bias, _ = block(hidden, hides, bias)
        out: Tensor = self.encoder.final_layer_norm(hidden)
        return out


def build_t5(sources: Mapping[str, Source], dtype: torch.dtype, device: torch.device | str) -> T5Encoder:
    """A frozen encoder with the weights `sources`, named as `t5_sources` does; sizes are read off them.

    Raises:
        ValueError: weights are missing, left over or do not fit.
    """
    with torch.device("meta"):
        encoder = T5Encoder(_config(sources))
    fill_module(encoder, sources, dtype, device)
    return encoder.eval().requires_grad_(False)


def t5_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the encoder in `file`, a decoder and the second copy of the token table left out.

    Raises:
        ValueError: there is no T5 encoder of version 1.1.
    """
    keys = file.keys()
    if _FIRST_QUERY not in keys:
        raise ValueError(f"{file.path}: no T5 text encoder is in it: {_FIRST_QUERY} is missing")
    if _FIRST_GATE not in keys:
        raise ValueError(f"{file.path}: a T5 of version 1.1 is needed, with gated layers: {_FIRST_GATE} is missing")
    own = [key for key in keys if key.startswith("encoder.") and key != _SECOND_TABLE]
    sources = {key: Source(file, key) for key in own}
    table = _TABLE if _TABLE in keys else _SECOND_TABLE
    if table in keys:
        sources[_TABLE] = Source(file, table)
    return sources


def tokenize_padded(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 [B, length] each: the ids of each caption, cut to leave room for the end mark, and 1 where they are."""
    rows, masks = [], []
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids = [*ids[: length - 1], END]
        missing = length - len(ids)
        rows.append(ids + [PADDING] * missing)
        masks.append([1] * len(ids) + [0] * missing)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(masks, dtype=torch.int64)


def check_t5_vocabulary(encoder: T5Encoder, tokenizer: Any, name: str) -> None:
    """Raise ValueError when `tokenizer` knows ids that the encoder of the file `name` has no vector for."""
    known, largest = encoder.config.vocab_size, len(tokenizer) - 1
    if largest >= known:
        raise ValueError(
            f"The T5 tokenizer has ids up to {largest}, but {name} knows {known} tokens: they do not belong together "
            "(see --tokenizer_cache_dir)"
        )


_TABLE, _SECOND_TABLE = "shared.weight", "encoder.embed_tokens.weight"
_LAYER = "encoder.block.0.layer."
_FIRST_QUERY = f"{_LAYER}0.SelfAttention.q.weight"
_FIRST_BIAS = f"{_LAYER}0.SelfAttention.relative_attention_bias.weight"
_FIRST_GATE = f"{_LAYER}1.DenseReluDense.wi_0.weight"
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")


def _config(sources: Mapping[str, Source]) -> T5Config:
    for name in (_TABLE, _FIRST_BIAS):
        if name not in sources:
            file = next(iter(sources.values())).file.path
            raise ValueError(f"{file}: the T5 text encoder is not whole: {name} is missing")
    vocabulary, width = sources[_TABLE].shape
    buckets, heads = sources[_FIRST_BIAS].shape
    layers = max(int(match[1]) for name in sources if (match := _BLOCK.match(name))) + 1
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=sources[_FIRST_QUERY].shape[0] // heads,
        d_ff=sources[_FIRST_GATE].shape[0],
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        attn_implementation="sdpa",
    )
