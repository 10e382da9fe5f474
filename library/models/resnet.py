"""The convolutions that the U-Nets are made of.

Class names are those of diffusers, since network modules of others choose the layers they adapt by them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from library.models.norms import GroupNorm


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions with the time added between them: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(32, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(32, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Takes x [B, in, h, w], time [B, time_dim] -> [B, out, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample2D(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)]"""
        out: Tensor = self.conv(x)
        return out


class Upsample2D(nn.Module):
    """Each pixel repeated until the map has the wanted size, then smoothed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, h, w] -> [B, C, *size]; a size that is not twice as large meets a skip of odd height or width."""
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
