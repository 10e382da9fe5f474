"""How files name the modules of a U-Net: all blocks of a direction in one row, or level by level.

The first are the names of latent-diffusion, in single files (`input_blocks.4.1.proj_in`); the second those of
diffusers (`down_blocks.1.attentions.0.proj_in`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

UNET_PREFIX = "model.diffusion_model."
"""What stands before the names of a U-Net in a single file with a whole model."""


def names_in_row(names: Collection[str]) -> dict[str, str]:
    """Name by level -> name in a row, for all `names` of the weights of a U-Net."""
    levels = len(_numbers(names, r"down_blocks\.(\d+)\."))
    layers = len(_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\."))
    with_text = _numbers(names, r"up_blocks\.(\d+)\.attentions\.")
    rows = {
        by_level: row
        for row, by_level in modules_by_level(levels, layers).items()
        if not by_level.endswith(".upsamplers.0.conv")
        or row.endswith(".2.conv") == (int(by_level.split(".")[1]) in with_text)
    }
    return {name: name_in_row(name, rows) for name in names}


def names_by_level(names: Collection[str]) -> dict[str, str | None]:
    """Name in a row -> name by level, or None, for all `names` of the weights of a U-Net."""
    modules = modules_by_level(*counts_of(names))
    return {name: name_by_level(name, modules) for name in names}


def counts_of(names: Iterable[str]) -> tuple[int, int]:
    """Levels, and layers of each on the way down, of a U-Net with the `names` in a row."""
    names = list(names)
    shrinking = _numbers(names, r"input_blocks\.(\d+)\.0\.op\.weight")
    blocks = _numbers(names, r"input_blocks\.(\d+)\.")
    # The first block is conv_in, then each level has its layers and one that shrinks, which the last level lacks.
    return len(shrinking) + 1, (min(shrinking) if shrinking else max(blocks, default=0) + 1) - 1


def modules_by_level(levels: int, layers: int) -> dict[str, str]:
    """Name in a row -> name by level, of every module of a U-Net with so many levels and layers of each."""
    modules = dict(_FIXED_MODULES)
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for i in range(layers):
            modules[f"input_blocks.{first + i}.0"] = f"down_blocks.{level}.resnets.{i}"
            modules[f"input_blocks.{first + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        modules[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        first = level * (layers + 1)
        for i in range(layers + 1):
            modules[f"output_blocks.{first + i}.0"] = f"up_blocks.{level}.resnets.{i}"
            modules[f"output_blocks.{first + i}.1"] = f"up_blocks.{level}.attentions.{i}"
        # It stands behind the attention where the level has any.
        for place in (1, 2):
            modules[f"output_blocks.{first + layers}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return modules


def name_by_level(name: str, modules: Mapping[str, str]) -> str | None:
    """A name in a row -> its name by level; None for one that fits nowhere."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        ours = modules.get(".".join(parts[:length]))
        if ours is None:
            continue
        rest = parts[length:]
        layer, kind = ".".join(rest[:-1]), rest[-1]
        if ".resnets." in ours:
            layer = _RESNET_LAYERS.get(layer, layer)
        return ".".join(part for part in (ours, layer, kind) if part)
    return None


def name_in_row(name: str, rows: Mapping[str, str]) -> str:
    """A name by level -> its name in a row; `rows` are the modules, the other way round."""
    parts = name.split(".")
    length = next(count for count in range(len(parts) - 1, 0, -1) if ".".join(parts[:count]) in rows)
    ours = ".".join(parts[:length])
    layer, kind = ".".join(parts[length:-1]), parts[-1]
    if ".resnets." in ours:
        layer = _PUBLISHED_RESNET_LAYERS[layer]
    return ".".join(part for part in (rows[ours], layer, kind) if part)


_FIXED_MODULES = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_PUBLISHED_RESNET_LAYERS = {ours: theirs for theirs, ours in _RESNET_LAYERS.items()}


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
