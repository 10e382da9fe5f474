"""The layer that an adapter changes, as the adapter sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.core.low_rank import FrozenWeight


class BaseLayer:
    """A linear layer or convolution: its answer, its weight as of now, and its arithmetic with another weight.

    It may calculate in its own way (a weight in float8, one that is streamed, another adapter). Its weight is read
    anew each time; nobody may keep it beyond the calculation at hand.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.channels = layer.out_channels if self.is_conv else layer.out_features
        self.inputs = layer.in_channels if self.is_conv else layer.in_features

    def answer(self, x: Tensor) -> Tensor:
        """What the layer answers without the adapter."""
        answer: Tensor = self._layer.forward(x)
        return answer

    @property
    def bias(self) -> Tensor | None:
        """[O], or None."""
        bias: Tensor | None = self._layer._parameters["bias"]
        return bias

    @property
    def shape(self) -> torch.Size:
        """Of the weight: [O, C], or [O, C, k, k]."""
        weight: Tensor = self._layer._parameters["weight"]
        return weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """In which the weight is stored."""
        weight: Tensor = self._layer._parameters["weight"]
        return weight.dtype

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`."""
        forward = self._layer.forward
        if isinstance(forward, FrozenWeight):
            return forward.read(dtype)
        weight: Tensor = self._layer._parameters["weight"]
        return weight.to(dtype)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's arithmetic with another weight of the same shape."""
        if not self.is_conv:
            return nn.functional.linear(x, weight, bias)
        answer: Tensor = self._layer._conv_forward(x, weight, bias)
        return answer

    @property
    def channel_dim(self) -> int:
        """Which dimension of an answer the channels are."""
        return 1 if self.is_conv else -1
