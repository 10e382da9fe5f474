"""Norms whose answer has the number format of what they are given, under autocast too.

On a GPU autocast would calculate them in float32 and answer so: twice the memory traffic, a copy of the input and of
the weights before, and a copy of the answer for every layer after. The kernels add up in float32 at any rate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """The norm over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        with _format_kept(input, self.weight):
            return super().forward(input)


class GroupNorm(nn.GroupNorm):
    """The norm over pixels and groups of channels."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]"""
        with _format_kept(input, self.weight):
            return super().forward(input)


def _format_kept(x: Tensor, weight: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, unless it has two formats to bring to one: trained weights may be in float32."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype == x.dtype:
        return torch.autocast(kind, enabled=False)
    return nullcontext()
