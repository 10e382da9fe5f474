"""The keys of a U-Net in the published single-file layout, and the sizes that the shapes tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from library.files.weights import Source, WeightFile
from library.models.sd.unet import UNetShape

UNET_PREFIX = "model.diffusion_model."
V1_HEADS = 8
"""1.x has eight attention heads at every width."""
V2_HEAD_DIM = 64
"""2.x has as many heads as fit at this width each."""


def unet_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the U-Net in `file`, under the names of our modules, which are those of diffusers.

    `file` is a whole checkpoint, or the U-Net of a diffusers folder.
    """
    keys = [key for key in file.keys() if key.startswith(UNET_PREFIX)]
    if not keys:
        return {key: Source(file, key) for key in file.keys()}
    modules = _modules(*_counts([key.removeprefix(UNET_PREFIX) for key in keys]))
    return {_our_name(key.removeprefix(UNET_PREFIX), modules): Source(file, key) for key in keys}


def published_unet_keys(names: Collection[str]) -> dict[str, str]:
    """Our name -> its key in the published single-file layout, for all `names` of a U-Net."""
    levels = len(_numbers(names, r"down_blocks\.(\d+)\."))
    layers = len(_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\."))
    with_text = _numbers(names, r"up_blocks\.(\d+)\.attentions\.")
    published = {
        ours: theirs
        for theirs, ours in _modules(levels, layers).items()
        if not ours.endswith(".upsamplers.0.conv")
        or theirs.endswith(".2.conv") == (int(ours.split(".")[1]) in with_text)
    }
    return {name: UNET_PREFIX + _published_name(name, published) for name in names}


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


_FIXED_MODULES = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
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


def _counts(names: list[str]) -> tuple[int, int]:
    """Levels, and layers of each on the way down, of a U-Net with the published `names`."""
    shrinking = _numbers(names, r"input_blocks\.(\d+)\.0\.op\.weight")
    blocks = _numbers(names, r"input_blocks\.(\d+)\.")
    # The first block is conv_in, then each level has its layers and one that shrinks, which the last level lacks.
    return len(shrinking) + 1, (min(shrinking) if shrinking else max(blocks, default=0) + 1) - 1


def _modules(levels: int, layers: int) -> dict[str, str]:
    """Published module -> ours. The published layout counts all blocks of a direction in one row."""
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


def _our_name(name: str, modules: Mapping[str, str]) -> str:
    """A key without its prefix -> our name; one that fits nowhere stays as it is, and is refused later."""
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
    return UNET_PREFIX + name


def _published_name(name: str, modules: Mapping[str, str]) -> str:
    """The other way round: our name -> a key without its prefix; `modules` maps ours to theirs."""
    parts = name.split(".")
    length = next(count for count in range(len(parts) - 1, 0, -1) if ".".join(parts[:count]) in modules)
    ours = ".".join(parts[:length])
    layer, kind = ".".join(parts[length:-1]), parts[-1]
    if ".resnets." in ours:
        layer = _PUBLISHED_RESNET_LAYERS[layer]
    return ".".join(part for part in (modules[ours], layer, kind) if part)


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len(_numbers(list(shapes), pattern))


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
