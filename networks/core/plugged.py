"""Layers with an adapter of any kind but plain LoRA, which has faster ones of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.adapter import Adapter, Dropout, Strength
from networks.core.base_layer import BaseLayer
from networks.core.low_rank import compute_dtype


class PluggedAdapter(Adapter):
    """An adapter that is handed the layer whose answer it changes."""

    def __init__(self, rank: int, alpha: float, dropout: Dropout, strength: Strength) -> None:
        super().__init__(rank, alpha / rank, dropout, strength)
        self.register_buffer("alpha", torch.tensor(float(alpha), device="cpu"))

    @abstractmethod
    def answer(self, base: BaseLayer, x: Tensor, factor: float) -> Tensor:
        """The answer of `base` with what this adapter adds to it, times `factor`."""

    def file_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), "alpha": self.alpha}

    def hold(self, base: Any) -> Mapping[str, Any]:
        return {"_base": BaseLayer(base)}

    def part_scale(self, part: Tensor, base: BaseLayer) -> Tensor | None:
        """The factors of what is added, of the shape of an answer: dropout masks and the factor of each sample."""
        if not (self.strength.rows is not None or (self.drops and self.training)):
            return None
        dim = base.channel_dim % part.dim()
        between = tuple(size for place, size in enumerate(part.shape) if place not in (0, dim))
        return self.channel_scale(len(part), between, dim, base.channels, part)

    def add(self, y: Tensor, part: Tensor, base: BaseLayer, factor: float) -> Tensor:
        """`y` plus `factor` times `part`, which dropout and the factor of each sample act on."""
        scale = self.part_scale(part, base)
        return torch.add(y, part if scale is None else part * scale, alpha=factor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """No alpha means the rank."""
        if any(key.startswith(prefix) for key in state_dict):
            alpha = state_dict.setdefault(f"{prefix}alpha", torch.tensor(float(self.rank)))
            self.scale = self.scale_of(float(alpha))
            self.loaded = True
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def scale_of(self, alpha: float) -> float:
        """The scale that a file with this alpha means."""
        return (alpha or float(self.rank)) / self.rank


class PluggedLinear(nn.Linear):
    """A linear layer with an adapter; weight, bias and state-dict keys are those of the layer it stands for."""

    _held: tuple[PluggedAdapter]
    _base: BaseLayer

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., O]"""
        factor = self._held[0].factor()
        return self._base.answer(input) if factor == 0.0 else self._held[0].answer(self._base, input, factor)


class PluggedConv2d(nn.Conv2d):
    """A convolution with an adapter; weight, bias and state-dict keys are those of the layer it stands for."""

    _held: tuple[PluggedAdapter]
    _base: BaseLayer

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, h, w]"""
        factor = self._held[0].factor()
        return self._base.answer(input) if factor == 0.0 else self._held[0].answer(self._base, input, factor)


PluggedAdapter.stand_ins = (PluggedLinear, PluggedConv2d)


def in_dtype_of(x: Tensor, *values: Tensor) -> list[Tensor]:
    """`values` in the dtype in which a layer computes on `x`."""
    dtype = compute_dtype(x)
    return [value.to(dtype) for value in values]
