"""Thin matrices of which one unit of neighbouring ranks learns at a time (DyLoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class OneUnit(Mapping[str, Tensor]):
    """Looks like the parameters of a thin layer: all of its ranks, of which those drawn for this step get a gradient.

    `side` is "down", whose rows are the ranks, or "up", whose columns are.
    """

    def __init__(self, adapter: Any, side: str) -> None:
        self._adapter = adapter
        self._side = side

    def __getitem__(self, key: str) -> Tensor:
        assert key == "weight"
        weight: Tensor = getattr(self._adapter, f"lora_{self._side}").weight
        start = self._adapter.unit_start
        if start is None or not self._adapter.training:
            return weight
        dim = 0 if self._side == "down" else 1
        end = start + self._adapter.unit
        fixed = weight.detach()
        parts = (
            fixed.narrow(dim, 0, start),
            weight.narrow(dim, start, self._adapter.unit),
            fixed.narrow(dim, end, self._adapter.rank - end),
        )
        return torch.cat(parts, dim)

    def __iter__(self) -> Iterator[str]:
        return iter(("weight",))

    def __len__(self) -> int:
        return 1
