"""The keys of Stable Diffusion XL in its published layouts, and the sizes that the shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from library.files.sources import Source
from library.files.unet_names import UNET_PREFIX, names_in_row
from library.files.weights import WeightFile
from library.models.sdxl.unet import UNetShape
from library.models.text.clip import clip_sources, openclip_sources

FOLDER_FIRST_KEY = "conv_in.weight"
"""The first weight of the U-Net in a folder of diffusers."""
CLIP_PREFIX = "conditioner.embedders.0.transformer."
OPENCLIP_PREFIX = "conditioner.embedders.1.model."
PROJECTION_KEYS = {"text_projection": False, "text_projection.weight": True}
"""Key of the projection of the pooled text -> whether it is stored as a linear layer has it, [out, in]."""


def unet_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the U-Net in `file`, under the names of our modules, which are those of a single file.

    `file` is a whole checkpoint, or the U-Net of a folder of diffusers.
    """
    keys = {key.removeprefix(UNET_PREFIX): key for key in file.keys() if key.startswith(UNET_PREFIX)}
    if keys:
        return {name: Source(file, key) for name, key in keys.items()}
    if FOLDER_FIRST_KEY not in file.keys():
        raise ValueError(f"{file.path}: no U-Net is in it, neither {UNET_PREFIX}* nor {FOLDER_FIRST_KEY}")
    return {name: Source(file, key) for key, name in names_in_row(file.keys()).items()}


def first_encoder_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of CLIP-L in a whole checkpoint, or in a folder's text_encoder."""
    whole = any(key.startswith(CLIP_PREFIX) for key in file.keys())
    return clip_sources(file, CLIP_PREFIX if whole else "")


def second_encoder_sources(file: WeightFile) -> tuple[dict[str, Source], Source | None, bool]:
    """The weights of OpenCLIP bigG and its projection, and whether that is stored [out, in].

    `file` is a whole checkpoint in OpenCLIP's layout, or a folder's text_encoder_2 in that of transformers.
    """
    keys = file.keys()
    prefix = OPENCLIP_PREFIX if any(key.startswith(OPENCLIP_PREFIX) for key in keys) else ""
    if prefix:
        layers = _numbers(keys, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
        sources = openclip_sources(file, prefix, max(layers, default=-1) + 1)
    else:
        sources = clip_sources(file)
    found = [(key, linear) for key, linear in PROJECTION_KEYS.items() if prefix + key in keys]
    for name in PROJECTION_KEYS:
        sources.pop(name, None)
    if not found:
        return sources, None, False
    key, linear = found[0]
    return sources, Source(file, prefix + key), linear


def unet_shape(shapes: Mapping[str, tuple[int, ...]], path: Path) -> UNetShape:
    """The sizes of a U-Net whose weights have `shapes`, under our names.

    Raises:
        ValueError: a weight that decides a size is missing.
    """

    def size(name: str, dim: int) -> int:
        if name not in shapes:
            raise ValueError(f"{path}: the U-Net is not whole: {name} is missing")
        return shapes[name][dim]

    shrinking = sorted(_numbers(shapes, r"input_blocks\.(\d+)\.0\.op\."))
    per_level = shrinking[0] if shrinking else max(_numbers(shapes, r"input_blocks\.(\d+)\."), default=1) + 1
    layers = per_level - 1
    firsts = [1 + level * per_level for level in range(len(shrinking) + 1)]
    depths = [_depth(shapes, f"input_blocks.{first}.1") for first in firsts]
    return UNetShape(
        widths=tuple(size(f"input_blocks.{first}.0.in_layers.2.weight", 0) for first in firsts),
        depths=tuple(depths),
        mid_depth=_depth(shapes, "middle_block.1"),
        layers_per_level=layers,
        context_dim=size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        vector_dim=size("label_emb.0.0.weight", 1),
        time_dim=size("time_embed.0.weight", 0),
        in_channels=size("input_blocks.0.0.weight", 1),
        out_channels=size("out.2.weight", 0),
    )


def _depth(shapes: Mapping[str, tuple[int, ...]], transformer: str) -> int:
    return len(_numbers(shapes, rf"{re.escape(transformer)}\.transformer_blocks\.(\d+)\."))


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
