"""Which block of a U-Net a layer is in, and what --network_args say about each block."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from networks.core.key_names import AdapterShape
from networks.core.options import NetworkArgs

logger = logging.getLogger(__name__)

BLOCK_ARGS = (
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
)
LR_WEIGHT_ARGS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of a U-Net are counted: the way down, the middle, the way up."""

    down: int
    mid: int
    up: int
    ends: int = 0
    """1 if what comes before all blocks and what comes after them counts as a block each."""

    @property
    def count(self) -> int:
        """All blocks."""
        return self.down + self.mid + self.up + 2 * self.ends


SD_BLOCKS = BlockLayout(down=12, mid=1, up=12)
SDXL_BLOCKS = BlockLayout(down=9, mid=3, up=9, ends=1)

_LAYER = re.compile(r"^(down|up)_blocks\.(\d+)\.(?:(?:attentions|resnets)\.(\d+)|(?:down|up)samplers)\.")
_MID = re.compile(r"^mid_block\.")


def sd_block_index(path: str) -> int:
    """The block, 0 to 24, of the layer at `path` of an SD 1.x or 2.x U-Net with diffusers' names.

    Each of the four steps down has two layers and a down-sampler, 1 to 12 with block 0 unused; 12 is the middle as
    well; each of the four steps up has three layers, the up-sampler counting with the last, 13 to 24.
    """
    if _MID.match(path):
        return SD_BLOCKS.down
    match = _LAYER.match(path)
    assert match is not None, f"{path} is in no block"
    way, step, layer = match.group(1), int(match.group(2)), match.group(3)
    first = 1 if way == "down" else 1 + SD_BLOCKS.down
    return first + 3 * step + (2 if layer is None else int(layer))


_NUMBERED = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(\d+)\.")
_FIRST = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def sdxl_block_index(path: str) -> int:
    """The block, 0 to 22, of the layer at `path` of an SDXL U-Net with the names of its single file.

    Input blocks are 1 to 9, the three layers of the middle 10 to 12, output blocks 13 to 21.
    """
    match = _NUMBERED.match(path)
    assert match is not None, f"{path} is in no block"
    return _FIRST[match.group(1)] + int(match.group(2))


@dataclass(frozen=True)
class BlockSettings:
    """Sizes and learning rates block by block; None where they are the same for the whole U-Net."""

    linear: list[AdapterShape] | None = None
    """Linear layers and 1x1 convolutions; rank 0 is no adapter."""
    conv: list[AdapterShape] | None = None
    """3x3 convolutions."""
    lr_weights: list[float] | None = None
    """Share of the learning rate; a block with 0 has no adapter."""


def read_block_settings(
    args: NetworkArgs, layout: BlockLayout, linear: AdapterShape, conv: AdapterShape | None
) -> BlockSettings:
    """What `args` say about blocks; `linear` and `conv` are the sizes where they say nothing.

    Raises:
        ValueError: a value is malformed, or a key needs another one that is absent.
    """
    lr_weights = read_lr_weights(args, layout)
    count = layout.count
    ranks, alphas = args.integers("block_dims", count), args.numbers("block_alphas", count)
    conv_ranks, conv_alphas = args.integers("conv_block_dims", count), args.numbers("conv_block_alphas", count)
    if alphas is not None and ranks is None and lr_weights is None:
        raise ValueError("--network_args block_alphas needs block_dims")
    if conv_ranks is not None and ranks is None and lr_weights is None:
        raise ValueError("--network_args conv_block_dims needs block_dims, or one of " + ", ".join(LR_WEIGHT_ARGS))
    if conv_alphas is not None and conv_ranks is None:
        raise ValueError("--network_args conv_block_alphas needs conv_block_dims")
    if ranks is None and conv_ranks is None and lr_weights is None:
        return BlockSettings()
    linears = _shapes(ranks or [linear.rank] * count, alphas or [linear.alpha] * count)
    convs = None
    if conv_ranks is not None:
        conv_alpha = args.number("conv_alpha")
        convs = _shapes(conv_ranks, conv_alphas or [1.0 if conv_alpha is None else conv_alpha] * count)
    elif conv is not None:
        convs = [conv] * count
    return BlockSettings(linears, convs, lr_weights)


def read_lr_weights(args: NetworkArgs, layout: BlockLayout) -> list[float] | None:
    """The share of the learning rate of every block, or None when none of the three keys is given.

    A part that is not given is 1 everywhere; a weight that does not exceed `block_lr_zero_threshold` is 0.
    """
    threshold = args.number("block_lr_zero_threshold")
    if not any(key in args for key in LR_WEIGHT_ARGS):
        if threshold is not None:
            raise ValueError("--network_args block_lr_zero_threshold needs one of " + ", ".join(LR_WEIGHT_ARGS))
        return None
    weights = [1.0] * layout.ends
    for key, count in zip(LR_WEIGHT_ARGS, (layout.down, layout.mid, layout.up), strict=True):
        text = args.text(key)
        weights += [1.0] * count if text is None else _weights(key, text, count)
    weights += [1.0] * layout.ends
    return [weight if weight > (threshold or 0.0) else 0.0 for weight in weights]


def _shapes(ranks: list[int], alphas: list[float]) -> list[AdapterShape]:
    return [AdapterShape(rank, alpha or float(rank)) for rank, alpha in zip(ranks, alphas, strict=True)]


def _sine(index: int, count: int) -> float:
    return math.sin(math.pi / 2 * index / (count - 1))


_PRESETS: dict[str, Callable[[int, int], float]] = {
    "sine": _sine,
    "cosine": lambda index, count: _sine(count - 1 - index, count),
    "linear": lambda index, count: index / (count - 1),
    "reverse_linear": lambda index, count: (count - 1 - index) / (count - 1),
    "zeros": lambda index, count: 0.0,
}
_PRESET = re.compile(rf"({'|'.join(_PRESETS)})(?:\+(\d*\.?\d+))?")


def _weights(key: str, text: str, count: int) -> list[float]:
    """`count` weights from a preset with an optional offset (`cosine+.25`), or from a list of numbers."""
    match = _PRESET.fullmatch(text.strip())
    if match and count > 1:
        preset, offset = _PRESETS[match.group(1)], float(match.group(2) or 0)
        return [preset(index, count) + offset for index in range(count)]
    if key != LR_WEIGHT_ARGS[1] and "," not in text:  # one number is a list of the middle only
        raise ValueError(
            f"--network_args {key}={text}: expected {count} numbers separated by commas, or one of "
            f"{', '.join(_PRESETS)}, each with an optional offset such as cosine+.25"
        )
    try:
        given = [float(part) if part.strip() else 0.0 for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--network_args {key}={text}: expected numbers separated by commas") from None
    if len(given) != count:
        change = "the rest is 1" if len(given) < count else "the last ones are not used"
        logger.warning("--network_args %s has %d weights for %d blocks; %s", key, len(given), count, change)
    return (given + [1.0] * count)[:count]
