"""The keys of a U-Net in the published single-file layout, and the sizes that the shapes tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from library.files.sources import Source
from library.files.unet_names import UNET_PREFIX, names_by_level, names_in_row
from library.files.weights import WeightFile
from library.models.sd.unet import UNetShape

V1_HEADS = 8
"""1.x has eight attention heads at every width."""
V2_HEAD_DIM = 64
"""2.x has as many heads as fit at this width each."""


def unet_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the U-Net in `file`, under the names of our modules, which are those of diffusers.

    `file` is a whole checkpoint, or the U-Net of a diffusers folder.
    """
    keys = {key.removeprefix(UNET_PREFIX): key for key in file.keys() if key.startswith(UNET_PREFIX)}
    if not keys:
        return {key: Source(file, key) for key in file.keys()}
    # One that fits nowhere keeps its name, and is refused later.
    return {ours or keys[name]: Source(file, keys[name]) for name, ours in names_by_level(keys).items()}


def published_unet_keys(names: Collection[str]) -> dict[str, str]:
    """Our name -> its key in the published single-file layout, for all `names` of a U-Net."""
    return {name: UNET_PREFIX + row for name, row in names_in_row(names).items()}


def unet_shape(shapes: Mapping[str, tuple[int, ...]], is_v2: bool, config: Mapping[str, Any], path: Path) -> UNetShape:
    """The sizes of a U-Net whose weights have `shapes`, under our names.

    Heads do not show in the weights: they follow from the version, unless `config`, the contents of
    unet/config.json, says how many there are (it calls them attention_head_dim).

    Raises:
        ValueError: a weight that decides a size is missing, or a width cannot be shared among the heads.
    """

    def size(name: str, dim: int) -> int:
        if name not in shapes:
            raise ValueError(f"{path}: the U-Net is not whole: {name} is missing")
        return shapes[name][dim]

    levels = range(_count(shapes, r"down_blocks\.(\d+)\."))
    widths = [size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in levels]
    return UNetShape(
        widths=tuple(widths),
        num_heads=_heads(widths, is_v2, config, path),
        depths=tuple(_count(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.") for i in levels),
        mid_depth=_count(shapes, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\."),
        layers_per_level=_count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        context_dim=size("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
        time_dim=size("time_embedding.linear_1.weight", 0),
        use_linear=is_v2,
        in_channels=size("conv_in.weight", 1),
        out_channels=size("conv_out.weight", 0),
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len({int(match[1]) for name in shapes if (match := re.match(pattern, name))})


def _heads(widths: list[int], is_v2: bool, config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    published = config.get("attention_head_dim")
    if isinstance(published, int):
        heads = [published] * len(widths)
    elif published:
        heads = [int(number) for number in published]
    elif is_v2:
        heads = [max(1, width // V2_HEAD_DIM) for width in widths]
    else:
        heads = [V1_HEADS] * len(widths)
    if len(heads) != len(widths) or any(width % count for width, count in zip(widths, heads)):
        raise ValueError(f"{path}: widths {widths} cannot be shared among {heads} attention heads")
    return tuple(heads)
