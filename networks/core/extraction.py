"""The LoRA that comes closest to a difference of two weights."""

from __future__ import annotations

import torch
from torch import Tensor

from networks.core.lora_file import LowRankPair

QUANTILE_SAMPLES = 1 << 24
"""`torch.quantile` takes no more values than this."""


@torch.no_grad()
def closest_pair(difference: Tensor, rank: int, clamp_quantile: float = 1.0) -> LowRankPair:
    """The adapter of at most `rank` whose product is nearest to `difference` [O, C, ...], by singular values.

    `up` holds them. Values of both greater than the `clamp_quantile` of all magnitudes are cut off there, since a
    few large ones cost precision when the file is stored in half; 1 cuts nothing. The rank is no greater than a side
    of the matrix, and alpha is the rank.

    Raises:
        ValueError: `difference` has values that are not finite.
    """
    matrix = difference.float().flatten(1)
    if not torch.isfinite(matrix).all():
        raise ValueError("there are infinite values or NaN among the weights")
    rank = min(rank, *matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    if clamp_quantile < 1.0:
        bound = magnitude_quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
        up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    if matrix.shape != difference.shape:
        up, down = up[:, :, None, None], down.reshape(rank, *difference.shape[1:])
    return LowRankPair(down.contiguous(), up.contiguous(), float(rank))


def magnitude_quantile(values: Tensor, quantile: float) -> float:
    """The magnitude that the share `quantile` of `values` does not exceed, interpolated linearly."""
    magnitudes = values.abs().flatten()
    if magnitudes.numel() <= QUANTILE_SAMPLES:
        return float(torch.quantile(magnitudes, quantile))
    place = quantile * (magnitudes.numel() - 1)
    low = int(place)
    below, above = torch.topk(magnitudes, magnitudes.numel() - low).values[-2:].flip(0).tolist()
    return below + (above - below) * (place - low)
