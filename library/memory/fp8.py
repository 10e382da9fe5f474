"""Weights in float8: how they are rounded, with and without scales, and how they are read back.

Layout of scaled weights: the weight keeps its key and shape, and `<layer>.scale_weight` holds what it is multiplied
with when it is read: one number, one for each row [O, 1], or one for each block of columns [O, C / block, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SMALLEST_SCALE = 1e-8
"""Of a block of zeros, whose own scale would be none."""
ROUNDED_AT_ONCE = 1 << 20
"""Numbers."""
SCALE_NAME = "scale_weight"
"""What the scale of a layer is called, beside its `weight`."""


class Scaling(Enum):
    """How many numbers of a weight share a scale."""

    NONE = "none"
    """There is no scale: a plain cast."""
    TENSOR = "tensor"
    CHANNEL = "channel"
    """One for each row."""
    BLOCK = "block"
    """One for each block of columns; one for each row where the columns cannot be divided."""


@dataclass(frozen=True)
class Format:
    """How weights are rounded."""

    scaling: Scaling = Scaling.BLOCK
    block: int = 64
    dtype: torch.dtype = torch.float8_e4m3fn


def quantize(weight: Tensor, form: Format = Format()) -> tuple[Tensor, Tensor | None]:
    """`weight` [O, ...] in float8 and its scale, in the dtype that `weight` has; None without scaling.

    The scale brings the largest number of its share to the largest of the format. Weights that are no matrix have one
    scale.
    """
    if form.scaling is Scaling.NONE:
        return weight.to(form.dtype), None
    largest = torch.finfo(form.dtype).max
    shares = _shares(weight, form)
    # A few rows at a time: float32 copies of a whole weight would be several times what is made of it.
    parts = shares.split(max(1, ROUNDED_AT_ONCE // max(shares[0].numel(), 1)))
    if shares is weight and not _by_row(weight, form):
        extreme = torch.stack([part.abs().amax().float() for part in parts]).amax()
        scales = [(extreme / largest).clamp_min(SMALLEST_SCALE)] * len(parts)
        scale = scales[0]
    else:
        scales = [(p.float().abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST_SCALE) for p in parts]
        scale = torch.cat(scales)
    rounded = torch.empty_like(shares, dtype=form.dtype)
    for target, part, own in zip(rounded.split(len(parts[0])), parts, scales, strict=True):
        target.copy_((part.float() / own).nan_to_num_(0.0).clamp_(-largest, largest))
    return rounded.view(weight.shape), scale.to(weight.dtype)


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The float8 `weight` [O, ...] in `dtype`, times its scale, in a tensor of its own.

    Two passes, since no operation of torch multiplies float8 with anything; a compiler makes one of them.
    """
    if scale is None:
        return weight.to(dtype)
    wide = weight.to(scale.dtype)
    shares = wide if scale.dim() < 3 else wide.view(*scale.shape[:2], -1)
    shares = shares * scale if torch.compiler.is_compiling() else shares.mul_(scale)
    return shares.view(weight.shape).to(dtype)


@dataclass
class Quantizer:
    """Rounds the weights of a model while it is read, one at a time; called with each name and value as stored.

    It takes matrices and convolutions whose name holds one of `targets` and none of `excluded`; all other values pass.
    `scales` collects what `attach_frozen_layers` needs afterwards.
    """

    form: Format
    targets: Sequence[str] = ("",)
    excluded: Sequence[str] = ()
    place: torch.device | None = None
    """Where it is calculated, such as a GPU for weights that stay in main memory; where they lie unless given."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> scale."""

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """`value`, or what it is in float8.

        Raises:
            ValueError: it is float8 already, and scales are wanted or the format is another.
        """
        if value.dtype in FLOAT8:
            return self._found(name, value)
        if not self._takes(name, value):
            return value
        rounded, scale = quantize(value.to(self.place or value.device), self.form)
        if scale is not None:
            self.scales[name.rpartition(".")[0]] = scale.to(value.device)
        return rounded.to(value.device)

    def _takes(self, name: str, value: Tensor) -> bool:
        layer, _, leaf = name.rpartition(".")
        wanted = any(part in layer for part in self.targets) and not any(part in layer for part in self.excluded)
        return wanted and leaf == "weight" and value.dim() >= 2 and value.is_floating_point()

    def _found(self, name: str, value: Tensor) -> Tensor:
        if self.form.scaling is not Scaling.NONE:
            raise ValueError(
                f"{name} is {_name(value.dtype)} in the file already: scales need the original numbers. "
                "Use a file in 16 or 32 bits, or --fp8_base instead of --fp8_scaled"
            )
        if value.dtype != self.form.dtype:
            raise ValueError(f"{name} is {_name(value.dtype)} in the file; of these formats float8_e4m3fn can be used")
        # What is small is calculated with as it is and not through a handle.
        return value if self._takes(name, value) else value.to(torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_row(weight: Tensor, form: Format) -> bool:
    """Whether the shares of `weight` itself are its rows."""
    return weight.dim() == 2 and form.scaling in (Scaling.CHANNEL, Scaling.BLOCK)


def _shares(weight: Tensor, form: Format) -> Tensor:
    """`weight`, or a view [O, C / block, block] of it."""
    if form.scaling is Scaling.BLOCK and weight.dim() == 2 and weight.shape[1] % form.block == 0:
        return weight.reshape(weight.shape[0], -1, form.block)
    return weight
