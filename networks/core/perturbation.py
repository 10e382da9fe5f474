"""Random nudges of the adapted weights while they are trained, as large as the gradient says (GGPO).

Every step a row of the weight is moved by normal noise of the size `sigma * |row| + beta * |its gradient|^2`, over the
root of the number of rows, so that training settles where such nudges do little harm. A nudge acts in forward and on
the gradient of the input; the adapter's own gradient is that of the nudged layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.core.low_rank import FrozenWeight

ROWS_LOOKED_AT = 1000
"""Of the base weight: the mean of their norms stands for all rows."""


@dataclass(frozen=True)
class Ggpo:
    """How large the nudges are."""

    sigma: float
    """Share of the norm of a row."""
    beta: float
    """Times the square of the norm of its gradient."""


class Perturbation(nn.Module):
    """The nudges of one linear layer; none before the first update.

    `size` [O, 1] belongs to the state of a run, not to the file of a network.
    """

    size: Tensor

    def __init__(self, layer: nn.Linear, ggpo: Ggpo) -> None:
        super().__init__()
        self.ggpo = ggpo
        self.base_norm = mean_row_norm(layer)
        self.register_buffer("size", torch.zeros(layer.out_features, 1, device="cpu"), persistent=False)

    @torch.no_grad()
    def update(self, down: Tensor, up: Tensor, d_down: Tensor, d_up: Tensor, scale: float) -> None:
        """Set the size from the adapter's matrices, [r, C] and [O, r], and their gradients."""
        norms = (self.base_norm**2 + squared_row_norms(up, down)).sqrt()
        # The gradient of the product, without making it: scale * (up @ d_down + d_up @ down).
        gradient = squared_row_norms(torch.cat([up, d_up], dim=1), torch.cat([d_down, down])) * scale**2
        self.size.copy_((self.ggpo.sigma * norms + self.ggpo.beta * gradient) / len(up) ** 0.5)

    @torch.no_grad()
    def draw(self, columns: int, dtype: torch.dtype) -> Tensor:
        """One nudge, [O, C].

        It comes from torch's own generator, whose state checkpointing puts back when it computes a layer again.
        """
        size = self.size.to(dtype)
        return torch.randn(len(size), columns, device=size.device, dtype=dtype).mul_(size)


def squared_row_norms(up: Tensor, down: Tensor) -> Tensor:
    """The squared norm of each row of `up @ down`, [O, 1], from products of the size of the rank only."""
    up, down = up.float(), down.float()
    return ((up @ (down @ down.t())) * up).sum(1, keepdim=True).clamp_(min=0)


@torch.no_grad()
def mean_row_norm(layer: nn.Linear) -> float:
    """About how long a row of the layer's weight is; 0 for a layer without content."""
    weight = layer.weight
    if weight.is_meta:
        return 0.0
    if isinstance(layer.forward, FrozenWeight):
        weight = layer.forward.read(torch.float32)
    rows = weight[:: max(1, -(-len(weight) // ROWS_LOOKED_AT))]
    return float(rows.float().norm(dim=1).mean())
