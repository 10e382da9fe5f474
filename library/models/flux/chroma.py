"""Chroma: FLUX.1 whose modulation layers gave way to one network that makes all modulations at once.

Keys as in https://huggingface.co/lodestones/Chroma; "distilled guidance layer" is its name for that network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode
from library.models.flux.model import FluxShape, Modulations, StreamTransformer, sinusoids
from library.models.flux.stream import RMSNorm


class ChromaTransformer(StreamTransformer):
    """FLUX.1 without pooled text; time and guidance go through the distilled guidance layer."""

    def __init__(self, shape: FluxShape, attention: AttentionMode = AttentionMode.SDPA) -> None:
        super().__init__(shape, has_modulation=False, attention=attention)
        self.distilled_guidance_layer = Approximator(
            shape.guidance_in_dim, shape.guidance_width, shape.width, shape.guidance_depth
        )

    def modulations(self, t: Tensor, guidance: Tensor | None, pooled: Tensor | None, dtype: torch.dtype) -> Modulations:
        """Vectors of each block's own; `pooled` is not looked at."""
        double, single = self.shape.double_blocks, self.shape.single_blocks
        vectors = self.modulation_vectors(t, guidance, dtype)[:, :, None]  # [B, N, 1, C]
        for_single, for_img, for_txt, last = vectors.split([3 * single, 6 * double, 6 * double, 2], dim=1)
        return Modulations(for_img.split(6, dim=1), for_txt.split(6, dim=1), for_single.split(3, dim=1), last)

    def modulation_vectors(self, t: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[B, 3 * single + 12 * double + 2, C]: single blocks, image and text of double blocks, the last layer.

        Each is made of the sinusoids of time and guidance (a quarter of the inputs each) and of its own number.
        """
        assert guidance is not None, "the guidance scale is an input of this model"
        count = 3 * self.shape.single_blocks + 12 * self.shape.double_blocks + 2
        inputs = self.shape.guidance_in_dim
        number = sinusoids(torch.arange(count, device=t.device), inputs // 2)
        both = torch.cat([sinusoids(t, inputs // 4), sinusoids(guidance, inputs // 4)], dim=-1)
        batch = len(t)
        x = torch.cat([both[:, None].expand(-1, count, -1), number[None].expand(batch, -1, -1)], dim=-1)
        out: Tensor = self.distilled_guidance_layer(x.to(dtype))
        return out


class Approximator(nn.Module):
    """A narrow residual network: [..., in_dim] -> [..., out_dim]."""

    def __init__(self, in_dim: int, width: int, out_dim: int, depth: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_dim, width)
        self.layers = nn.ModuleList(TwoLayers(width) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.out_proj = nn.Linear(width, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """-> [..., out_dim]"""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        out: Tensor = self.out_proj(x)
        return out


class TwoLayers(nn.Module):
    """Linear, SiLU, linear, all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """-> as `x`"""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out
