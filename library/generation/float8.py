"""Weights in float8 while pictures are made: rounded as they are read, or where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.memory.fp8 import FLOAT8, Format, Quantizer, Scaling, quantize
from library.memory.frozen_layers import attach_frozen_layers
from library.models.architecture import QuantizedLayers

KEPT = ("wo",)
"""Layers of text encoders that stay as they are: T5 of transformers brings what enters this one to its dtype."""


class RoundedWhileRead:
    """Rounds the weights of a denoiser as they come from the file, so that they never lie in memory in full.

    A file in float8 is taken as it is: there is nothing left to scale.
    """

    def __init__(self, layers: QuantizedLayers) -> None:
        self.scaled = Quantizer(Format(), layers.targets, layers.excluded)
        self.plain = Quantizer(Format(Scaling.NONE), layers.targets, layers.excluded)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """What takes the place of the weight `value`."""
        return (self.plain if value.dtype in FLOAT8 else self.scaled)(name, value)

    def attach(self, denoiser: nn.Module) -> None:
        """Let the layers calculate with what they hold now; before anything stands in them."""
        attach_frozen_layers(denoiser, self.scaled.scales)


@torch.no_grad()
def round_linear_layers(model: nn.Module, kept: Sequence[str] = KEPT) -> None:
    """Round the linear layers of `model` where they lie; layers whose name ends in one of `kept` stay."""
    scales = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in kept and layer.weight.dtype not in FLOAT8:
            rounded, scale = quantize(layer.weight.data)
            layer.weight.data = rounded
            if scale is not None:
                scales[name] = scale
    attach_frozen_layers(model, scales)
