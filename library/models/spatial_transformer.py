"""The transformer block that lets a U-Net's feature map look at itself and at the text.

Class names are those of diffusers, since network modules of others choose the layers they adapt by them.
"High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode, attention
from library.models.norms import GroupNorm, LayerNorm


class Transformer2DModel(nn.Module):
    """Attention over the pixels of a feature map: [B, C, h, w] -> [B, C, h, w], added to what came in.

    `use_linear` says whether the projections at both ends are linear layers (2.x, XL) or 1x1 convolutions (1.x);
    the numbers are the same, the shapes of the weights are not.
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int, depth: int, use_linear: bool) -> None:
        super().__init__()
        self.use_linear = use_linear
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, context_dim) for _ in range(depth)
        )
        self.proj_out: nn.Module = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Takes x [B, C, h, w], context [B, T, D] -> [B, C, h, w]."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        if self.use_linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # [B, h*w, C]
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.use_linear:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, (height, width))
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))
        return x + h


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each behind a layer norm and added."""

    def __init__(self, channels: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Takes x [B, L, C], context [B, T, D] -> [B, L, C]."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Attention of `x` [B, L, C] to `context` [B, T, D]."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mode = AttentionMode.SDPA
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """-> [B, L, C]"""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        out: Tensor = self.to_out[0](attention(q, k, v, self.num_heads, self.mode))
        return out


class FeedForward(nn.Module):
    """Four times as wide inside, gated: [B, L, C] -> [B, L, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The empty place in the middle keeps the published names net.0 and net.2.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """-> [B, L, C]"""
        out: Tensor = self.net(x)
        return out


class GEGLU(nn.Module):
    """One half of a projection times the exact GELU of the other (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, inner]"""
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated
