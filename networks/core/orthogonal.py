"""OFT: the outputs of a layer are turned, block by block, by an orthogonal matrix.

From "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (https://arxiv.org/abs/2306.07280). With
Q = B - B^T the turn is R = (I + Q)(I - Q)^-1, and W'[k, m] = sum_n R[k, n, m] W[k, n] for block k. Outputs are turned
instead of the weight, which is the same and needs no weight: a layer in float8 or one that is streamed stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.core.adapter import Dropout, Strength
from networks.core.base_layer import BaseLayer
from networks.core.plugged import PluggedAdapter


class OrthogonalAdapter(PluggedAdapter):
    """`oft_blocks` [blocks, b, b], with blocks x b outputs; `alpha` limits the norm of Q to alpha x outputs."""

    def __init__(self, layer: nn.Module, blocks: int, alpha: float, dropout: Dropout, strength: Strength) -> None:
        super().__init__(blocks, alpha, dropout, strength)
        self.scale = 1.0
        outputs = BaseLayer(layer).channels
        if outputs % blocks:
            raise ValueError(
                f"--network_dim {blocks} is the number of blocks of OFT, and a layer with {outputs} outputs cannot be "
                "divided into that many"
            )
        size = outputs // blocks
        self.outputs, self.limit = outputs, alpha
        self.oft_blocks = nn.Parameter(torch.zeros(blocks, size, size, device="cpu"))

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [self.oft_blocks], []

    def answer(self, base: BaseLayer, x: Tensor, factor: float) -> Tensor:
        y = base.answer(x)
        bias = base.bias
        if bias is None:
            plain = y
        elif base.is_conv:
            plain = y - bias.to(y.dtype).view(-1, 1, 1)
        else:
            plain = y - bias.to(y.dtype)
        return self.add(y, self._turned(plain, base), base, factor)

    def scale_of(self, alpha: float) -> float:
        self.limit = alpha
        return 1.0

    def _turned(self, y: Tensor, base: BaseLayer) -> Tensor:
        """By how much the turn changes `y`."""
        turn = turn_of(self.oft_blocks, self.limit * self.outputs).to(y.dtype)
        blocks, size, _ = turn.shape
        if not base.is_conv:
            return torch.einsum("...kn,knm->...km", y.unflatten(-1, (blocks, size)), turn).flatten(-2)
        return torch.einsum("bknhw,knm->bkmhw", y.unflatten(1, (blocks, size)), turn).flatten(1, 2)


def turn_of(blocks: Tensor, limit: float) -> Tensor:
    """R - I of `oft_blocks` [blocks, b, b], in float32; Q is shrunk where its norm exceeds `limit`."""
    with torch.autocast(blocks.device.type, enabled=False):
        blocks = blocks.float()
        q = blocks - blocks.transpose(1, 2)
        norm = torch.linalg.vector_norm(q)
        q = q * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
        identity = torch.eye(q.shape[1], device=q.device, dtype=q.dtype)
        return torch.linalg.solve(identity - q, identity + q, left=False) - identity


def turned_difference(tensors: dict[str, Any], weight: Tensor) -> Tensor:
    """What an adapter in a file adds to `weight`, [O, C] or [O, C, k, k] in float32."""
    blocks = tensors["oft_blocks"]
    turn = turn_of(blocks, float(tensors["alpha"]) * len(weight))
    rows = weight.reshape(len(blocks), blocks.shape[1], -1)
    return torch.einsum("knm,knc->kmc", turn, rows).reshape(weight.shape)
