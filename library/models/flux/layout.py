"""The keys of FLUX.1 and Chroma in single files and in folders of diffusers, and the sizes that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from library.files.sources import Source
from library.files.weights import WeightFile
from library.models.flux.model import FluxShape

PREFIX = "model.diffusion_model."
"""Before every key of some single files."""
_OF_DIFFUSERS = "single_transformer_blocks."

# Name in diffusers -> published name and its place among the tensors that are joined there.
_DOUBLE = {
    "norm1.linear": ("img_mod.lin", 0),
    "norm1_context.linear": ("txt_mod.lin", 0),
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.norm_q": ("img_attn.norm.query_norm", 0),
    "attn.norm_k": ("img_attn.norm.key_norm", 0),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", 0),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", 0),
    "attn.to_out.0": ("img_attn.proj", 0),
    "attn.to_add_out": ("txt_attn.proj", 0),
    "ff.net.0.proj": ("img_mlp.0", 0),
    "ff.net.2": ("img_mlp.2", 0),
    "ff_context.net.0.proj": ("txt_mlp.0", 0),
    "ff_context.net.2": ("txt_mlp.2", 0),
}
_SINGLE = {
    "norm.linear": ("modulation.lin", 0),
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", 0),
    "attn.norm_q": ("norm.query_norm", 0),
    "attn.norm_k": ("norm.key_norm", 0),
}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}
_SWAPPED = "final_layer.adaLN_modulation.1"
"""Scale and shift of the last layer: diffusers has them the other way round."""
_APPROXIMATOR = {"linear_1": "in_layer", "linear_2": "out_layer"}

_BLOCK = re.compile(r"(?P<list>transformer_blocks|single_transformer_blocks)\.(?P<n>\d+)\.(?P<layer>.+)")
_APPROXIMATOR_LAYER = re.compile(r"distilled_guidance_layer\.layers\.(?P<n>\d+)\.(?P<layer>\w+)")
_APPROXIMATOR_NORM = re.compile(r"distilled_guidance_layer\.norms\.\d+")


def is_of_diffusers(file: WeightFile) -> bool:
    """Whether the transformer in `file` has the layout of diffusers."""
    return any(key.startswith(_OF_DIFFUSERS) for key in file.keys())


def flux_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the transformer in `file` under their published names, whatever layout it has.

    Raises:
        ValueError: a key of a file of diffusers is not known.
    """
    if is_of_diffusers(file):
        return _from_diffusers(file)
    keys = file.keys()
    prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
    return {key.removeprefix(prefix): Source(file, key) for key in keys if key.startswith(prefix)}


def published_name(key: str) -> tuple[str, int] | None:
    """A key of diffusers -> the published key and the place among the tensors joined there; None if not known."""
    module, _, kind = key.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block is not None:
        single = block["list"].startswith("single")
        found = (_SINGLE if single else _DOUBLE).get(block["layer"])
        if found is None:
            return None
        layer = f"{'single' if single else 'double'}_blocks.{block['n']}.{found[0]}"
        return f"{layer}.{'scale' if layer.endswith('_norm') else kind}", found[1]
    layer_match = _APPROXIMATOR_LAYER.fullmatch(module)
    if layer_match is not None and layer_match["layer"] in _APPROXIMATOR:
        layer = f"distilled_guidance_layer.layers.{layer_match['n']}.{_APPROXIMATOR[layer_match['layer']]}"
        return f"{layer}.{kind}", 0
    if _APPROXIMATOR_NORM.fullmatch(module):
        return f"{module}.scale", 0
    return (f"{_OUTSIDE[module]}.{kind}", 0) if module in _OUTSIDE else None


def _from_diffusers(file: WeightFile) -> dict[str, Source]:
    parts: dict[str, dict[int, Source]] = {}
    strangers = {}
    for key in file.keys():
        found = published_name(key)
        if found is None:
            strangers[key] = Source(file, key)  # refused by whoever fills a model with it, together with its likes
            continue
        name, place = found
        if name.startswith(_SWAPPED):
            half = file.shape(key)[0] // 2
            scale, shift = Source(file, key, slice(0, half)), slice(half, None)
            parts[name] = {0: Source(file, key, shift, (scale,))}
        else:
            parts.setdefault(name, {})[place] = Source(file, key)
    return {name: _joined(pieces) for name, pieces in parts.items()} | strangers


def _joined(pieces: Mapping[int, Source]) -> Source:
    """One source of several in the order of their places."""
    first, *rest = (pieces[place] for place in sorted(pieces))
    return Source(first.file, first.key, first.rows, tuple(rest)) if rest else first


def flux_shape(shapes: Mapping[str, tuple[int, ...]], path: Path) -> FluxShape:
    """The sizes of a transformer or ControlNet whose weights have `shapes`, under their published names.

    Raises:
        ValueError: a weight that decides a size is missing, or the sizes do not go together.
    """

    def size(name: str, dim: int) -> int:
        if name not in shapes or len(shapes[name]) <= dim:
            raise ValueError(f"{path}: the FLUX transformer is not whole: {name} is missing or has no such size")
        return shapes[name][dim]

    width, head_dim = size("img_in.weight", 0), size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    if head_dim == 0 or width % head_dim:
        raise ValueError(f"{path}: {width} channels cannot be shared among heads of {head_dim}")
    approximator = "distilled_guidance_layer"
    takes_pooled = "vector_in.in_layer.weight" in shapes
    depth = _count(shapes, rf"{approximator}\.layers\.(\d+)\.")
    return FluxShape(
        in_channels=size("img_in.weight", 1),
        width=width,
        num_heads=width // head_dim,
        mlp_width=size("double_blocks.0.img_mlp.0.weight", 0),
        text_dim=size("txt_in.weight", 1),
        double_blocks=_count(shapes, r"double_blocks\.(\d+)\."),
        single_blocks=_count(shapes, r"single_blocks\.(\d+)\."),
        pooled_dim=size("vector_in.in_layer.weight", 1) if takes_pooled else 0,
        has_guidance="guidance_in.in_layer.weight" in shapes,
        guidance_in_dim=size(f"{approximator}.in_proj.weight", 1) if depth else 0,
        guidance_width=size(f"{approximator}.in_proj.weight", 0) if depth else 0,
        guidance_depth=depth,
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the highest number; a gap shows later as missing weights."""
    return max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1) + 1
