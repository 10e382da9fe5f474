"""How a timestep becomes a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of `t` [B] -> float32 [B, dim]: the cosines first, then the sines.

    "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239), with the order of Stable Diffusion.
    """
    half = dim // 2
    # In this order of roundings: the last bits of a frequency times a large number are seen.
    powers = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * powers.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
