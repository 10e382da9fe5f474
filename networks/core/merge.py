"""The arithmetic of merging adapters into weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def low_rank_difference(down: Tensor, up: Tensor, factor: float, shape: torch.Size) -> Tensor:
    """What an adapter adds to a weight of `shape`, in float32: `factor * up @ down`.

    One formula serves linear layers and convolutions of any kernel, and 4-D tensors of a 1x1 convolution for a 2-D
    weight: down is [r, C] or [r, C, k, k], up is [O, r] or [O, r, 1, 1].
    """
    return (factor * (up.float().flatten(1) @ down.float().flatten(1))).reshape(shape)


@torch.no_grad()
def merge_into(
    weight: Tensor,
    difference: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Add `difference` of the weight to it, computed in float32 on `device`, stored as `dtype` (by default its own)."""
    place = device or weight.device
    merged = weight.to(place, torch.float32, copy=True)
    merged += difference(merged)
    if dtype is None or dtype == weight.dtype:
        weight.copy_(merged)
    else:
        weight.data = merged.to(weight.device, dtype)


def low_rank_norm(down: Tensor, up: Tensor) -> Tensor:
    """The Frobenius norm of `up @ down`, a scalar, from products of the size of the rank only.

    |BA|^2 = trace(A' B' B A) = sum((B' B) * (A A')).
    """
    b, a = up.detach().float().flatten(1), down.detach().float().flatten(1)
    return ((b.t() @ b) * (a @ a.t())).sum().clamp_(min=0).sqrt_()
