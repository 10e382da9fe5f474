"""CLIP text encoders: built to the shapes of their weights, and what they make of rows of tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from library.files.sources import Source, fill_module
from library.files.weights import WeightFile
from library.models.text.tokens import Tokenizer, TokenRows

HEAD_DIM = 64
"""Width of one attention head in every published CLIP text encoder."""


class TextEncoder(CLIPTextModel):
    """CLIP's text transformer without the parts that no image model looks at.

    Modules and parameters are those of transformers' CLIPTextModel; only `forward` is shorter: it stops at the layer
    that is wanted and keeps no other states.
    """

    def forward(self, input_ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids [B, L] -> [B, L, D]: the `clip_skip`-th states from the end, through the final norm."""
        out: Tensor = self.final_layer_norm(self.states(input_ids, clip_skip)[0])
        return out

    def states(self, input_ids: Tensor, *from_end: int) -> list[Tensor]:
        """Token ids [B, L] -> [B, L, D] without the final norm: states counted `from_end`, 1 for the last layer's.

        The number of the deepest state comes last, and no layer beyond it is run.
        """
        hidden = self.embeddings(input_ids=input_ids)
        mask = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        wanted = [len(self.encoder.layers) + 1 - number for number in from_end]
        found = []
        for count, layer in enumerate(self.encoder.layers[: wanted[-1]], start=1):
            hidden = layer(hidden, mask, is_causal=True)
            if count in wanted:
                found.append(hidden)
        return found


def build_text_encoder(
    sources: Mapping[str, Source],
    activation: str,
    dtype: torch.dtype,
    device: torch.device | str,
    published: Mapping[str, Any] | None = None,
) -> TextEncoder:
    """A frozen encoder with the weights `sources`, named as `clip_sources` does.

    Sizes are read off the weights; `published`, the contents of a config.json, decides the number of heads and the
    activation when it says them.

    Raises:
        ValueError: weights are missing, left over or do not fit.
    """
    published = published or {}
    with torch.device("meta"):
        encoder = TextEncoder(_config(sources, activation, published))
    # Made from nothing but its length and absent from weight files, so the meta device must not have it.
    length = encoder.config.max_position_embeddings
    encoder.embeddings.position_ids = torch.arange(length).expand((1, -1))
    fill_module(encoder, sources, dtype, device)
    return encoder.eval().requires_grad_(False)


def clip_sources(file: WeightFile, prefix: str = "") -> dict[str, Source]:
    """The weights under `prefix` in the layout of transformers, with or without `text_model.` in their names."""
    sources = {}
    for key in file.keys():
        if not key.startswith(prefix) or key.endswith("position_ids"):
            continue
        sources[key.removeprefix(prefix).removeprefix("text_model.")] = Source(file, key)
    return sources


def openclip_sources(file: WeightFile, prefix: str, num_layers: int) -> dict[str, Source]:
    """The weights under `prefix` in the layout of OpenCLIP; layers from `num_layers` on and the projection left out.

    Query, key and value lie in one tensor there, in this order.
    """
    sources = {}
    for key in file.keys():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in _OPENCLIP_UNUSED or name.endswith("position_ids"):
            continue
        block = _OPENCLIP_BLOCK.fullmatch(name)
        if block is None:
            sources[_OPENCLIP_NAMES.get(name, name)] = Source(file, key)
        elif int(block["layer"]) < num_layers:
            layer = f"encoder.layers.{block['layer']}."
            if block["part"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = block["part"].rpartition("_")[2]
                width = file.shape(key)[0] // 3
                for i, letter in enumerate("qkv"):
                    rows = slice(i * width, (i + 1) * width)
                    sources[f"{layer}self_attn.{letter}_proj.{kind}"] = Source(file, key, rows)
            else:
                module, _, kind = block["part"].rpartition(".")
                sources[f"{layer}{_OPENCLIP_MODULES.get(module, module)}.{kind}"] = Source(file, key)
    return sources


def openclip_layout(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Key in the layout of OpenCLIP -> our names, whose weights follow one another in it along the first dimension."""
    layout: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer is None:
            layout[_OPENCLIP_KEYS[name]] = [name]
            continue
        module, _, kind = name[layer.end() :].rpartition(".")
        part = f"attn.in_proj_{kind}" if module in _QKV else f"{_OPENCLIP_LAYER_KEYS[module]}.{kind}"
        layout.setdefault(f"transformer.resblocks.{layer[1]}.{part}", []).append(name)
    return {
        key: tuple(sorted(parts, key=lambda name: [name.find(module) < 0 for module in _QKV]))
        for key, parts in layout.items()
    }


def encode_rows(encoder: nn.Module, ids: Tensor, clip_skip: int) -> Tensor:
    """Token rows [B, rows, 77] -> states [B, rows, 77, D], on the device of the encoder."""
    ids = ids.to(next(encoder.parameters()).device, non_blocking=True)
    states: Tensor = encoder(ids.flatten(0, 1), clip_skip)
    return states.unflatten(0, ids.shape[:2])


def encode_caption(encoder: nn.Module, ids: Tensor, weights: Tensor | None, clip_skip: int = 1) -> Tensor:
    """Training captions [B, rows, 77] -> [B, 75 * rows + 2, D], put together as `joined_rows` does."""
    return joined_rows(encode_rows(encoder, ids, clip_skip), weights)


def joined_rows(states: Tensor, weights: Tensor | None) -> Tensor:
    """Rows of states [B, rows, 77, D] -> [B, 75 * rows + 2, D]; `weights` are [B, rows, 77].

    The marks between rows are left out, and states are multiplied by their weights as they are.
    """
    if weights is not None:
        states = states * weights.to(states, non_blocking=True)[..., None]
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode_prompt(encoder: nn.Module, rows: TokenRows, clip_skip: int = 1) -> Tensor:
    """Prompts of pictures to be made -> [B, 77 * rows, D]: every row keeps its marks, weights as `weighted_prompt`."""
    return weighted_prompt(encode_rows(encoder, rows.ids, clip_skip), rows.weights)


def weighted_prompt(states: Tensor, weights: Tensor) -> Tensor:
    """Rows of states [B, rows, 77, D] and weights [B, rows, 77] -> [B, 77 * rows, D] with each prompt's mean kept."""
    plain = states.flatten(1, 2).float()
    weighted = plain * weights.to(plain.device).flatten(1)[..., None]
    restored = plain.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True)
    return (weighted * restored).to(states.dtype)


def check_vocabulary(encoder: TextEncoder, tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError when `tokenizer` knows ids that the encoder of the model `name` has no vector for."""
    known = encoder.config.vocab_size
    largest = max(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if largest >= known:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the text encoder of {name} knows {known} tokens: "
            "they do not belong together (see --tokenizer_cache_dir)"
        )


_OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)")
_OPENCLIP_UNUSED = ("text_projection", "logit_scale")
_OPENCLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPENCLIP_MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPENCLIP_KEYS = {ours: theirs for theirs, ours in _OPENCLIP_NAMES.items()}
_OPENCLIP_LAYER_KEYS = {ours: theirs for theirs, ours in _OPENCLIP_MODULES.items()}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def _config(sources: Mapping[str, Source], activation: str, published: Mapping[str, Any]) -> CLIPTextConfig:
    anchors = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    first_mlp = "encoder.layers.0.mlp.fc1.weight"
    for name in (*anchors, first_mlp):
        if name not in sources:
            files = ", ".join(sorted({str(source.file.path) for source in sources.values()})) or "the file"
            raise ValueError(f"{files}: no CLIP text encoder is in it: {name} is missing")
    vocabulary, width = sources[anchors[0]].shape
    layers = {int(match[1]) for name in sources if (match := _LAYER.match(name))}
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=sources[first_mlp].shape[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=published.get("num_attention_heads", max(1, width // HEAD_DIM)),
        max_position_embeddings=sources[anchors[1]].shape[0],
        hidden_act=published.get("hidden_act", activation),
        # The last two of every published vocabulary; nothing here reads them.
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        attn_implementation="sdpa",
    )
