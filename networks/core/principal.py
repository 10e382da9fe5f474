"""The principal part of a weight, from which PiSSA starts (https://arxiv.org/abs/2404.02948)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.base_layer import BaseLayer

ROUNDS = 4
"""Power iterations of the quick way: the singular values it finds are right to a percent or so."""
SPARE = 8
"""Directions looked at beyond those that are kept."""
SEED = 20240403


@torch.no_grad()
def principal_pair(layer: nn.Module, rank: int, scale: float, rounds: int) -> tuple[Tensor, Tensor]:
    """`down` [r, C...] and `up` [O, r] with `scale * up @ down` the best approximation of the layer's weight.

    `rounds` is how many power iterations of a random subspace it may take, 0 for a whole singular value decomposition.
    Equal layers give equal pairs; torch's own generator is not touched. A layer without content gives zeros.

    Raises:
        ValueError: the rank is greater than that of the weight.
    """
    weight = BaseLayer(layer).weight(torch.float32)
    matrix = weight.flatten(1)
    if rank > min(matrix.shape):
        raise ValueError(f"--network_args pissa: rank {rank} is more than a weight of {list(weight.shape)} has")
    if weight.is_meta:
        return torch.zeros(rank, matrix.shape[1]), torch.zeros(len(matrix), rank)
    width = rank + SPARE
    if rounds and width < min(matrix.shape):
        generator = torch.Generator(matrix.device).manual_seed(SEED)
        start = torch.randn(matrix.shape[1], width, device=matrix.device, generator=generator)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(rounds):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
        small = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
        left, values, right = basis @ small.U, small.S, small.Vh
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return (root[:, None] * right[:rank]).cpu(), (left[:, :rank] * root).cpu()


class BesideTwin(Mapping[str, Tensor]):
    """Looks like the parameters of a thin layer, with the twin that takes off what the pair started as beside it.

    `side` is "down" or "up".
    """

    def __init__(self, adapter: Any, side: str) -> None:
        self._adapter = adapter
        self._side = side

    def __getitem__(self, key: str) -> Tensor:
        assert key == "weight"
        weight = getattr(self._adapter, f"lora_{self._side}").weight
        twin: Tensor = getattr(self._adapter, f"twin_{self._side}")
        return torch.cat([weight, twin]) if self._side == "down" else torch.cat([weight, -twin], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(("weight",))

    def __len__(self) -> int:
        return 1
