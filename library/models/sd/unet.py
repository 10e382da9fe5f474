"""The U-Net of Stable Diffusion 1.x and 2.x.

Parameters are named as in diffusers' UNet2DConditionModel, so that its weight files and everybody's LoRA names fit.
"High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode
from library.models.embeddings import timestep_embedding
from library.models.norms import GroupNorm
from library.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from library.models.spatial_transformer import CrossAttention, Transformer2DModel


@dataclass(frozen=True)
class UNetShape:
    """Everything that decides the weights of a U-Net; one entry per level, from full resolution down."""

    widths: tuple[int, ...]
    """Channels of each level; every level but the last halves height and width."""
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    """Transformer blocks after each resnet; 0 for a level that does not see the text."""
    mid_depth: int
    layers_per_level: int
    """Resnets on the way down; there is one more on the way up."""
    context_dim: int
    time_dim: int
    use_linear: bool
    """The ends of the transformers are linear layers (2.x), not 1x1 convolutions (1.x)."""
    in_channels: int = 4
    out_channels: int = 4


class UNet(nn.Module):
    """Answers noisy latents with the noise (or the velocity) in them."""

    def __init__(self, shape: UNetShape, attention: AttentionMode = AttentionMode.SDPA) -> None:
        super().__init__()
        self.shape = shape
        levels = range(len(shape.widths))
        self.conv_in = nn.Conv2d(shape.in_channels, shape.widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(shape.widths[0], shape.time_dim)
        self.down_blocks = nn.ModuleList(DownBlock(shape, level) for level in levels)
        self.up_blocks = nn.ModuleList(UpBlock(shape, level) for level in reversed(levels))
        self.mid_block = MidBlock(shape)
        self.conv_norm_out = GroupNorm(32, shape.widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(shape.widths[0], shape.out_channels, 3, padding=1)
        self.set_attention(attention)

    def set_attention(self, mode: AttentionMode) -> None:
        """Use `mode` in every attention layer."""
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.mode = mode

    def blocks(self) -> list[nn.Module]:
        """The blocks in running order, each of which can be recomputed in backward."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Takes x [B, 4, h, w], t [B] in 0..999, context [B, T, D] -> [B, 4, h, w]."""
        time = self.time_embedding(timestep_embedding(t, self.shape.widths[0]).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            states = down(x, time, context)
            skips.extend(states)
            x = states[-1]
        x = self.mid_block(x, time, context)
        count = self.shape.layers_per_level + 1
        for up in self.up_blocks:
            used, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = up(x, time, context, size, *reversed(used))
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class TimeEmbedding(nn.Module):
    """Two linear layers over the sinusoids of the time: [B, C] -> [B, time_dim].

    Not called as in diffusers: LyCORIS chooses layers by class and by path, and would choose these twice.
    """

    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """-> [B, time_dim]"""
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids)))
        return out


class DownBlock(nn.Module):
    """One level on the way down; its answer is every state that the way up wants to see again."""

    def __init__(self, shape: UNetShape, level: int) -> None:
        super().__init__()
        width = shape.widths[level]
        before = shape.widths[max(level - 1, 0)]
        count = shape.layers_per_level
        self.attentions = _transformers(shape, level, count)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(before if i == 0 else width, width, shape.time_dim) for i in range(count)
        )
        is_last = level == len(shape.widths) - 1
        self.downsamplers = None if is_last else nn.ModuleList([Downsample2D(width)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Takes x [B, C, h, w], time [B, time_dim], context [B, T, D] -> one state per resnet, and the smaller one."""
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            states.append(x)
        if self.downsamplers is not None:
            states.append(self.downsamplers[0](x))
        return tuple(states)


class MidBlock(nn.Module):
    """The lowest level: a resnet, a transformer, a resnet."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        width = shape.widths[-1]
        self.attentions = nn.ModuleList(
            [Transformer2DModel(width, shape.num_heads[-1], shape.context_dim, shape.mid_depth, shape.use_linear)]
        )
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, shape.time_dim) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Takes x [B, C, h, w], time [B, time_dim], context [B, T, D] -> [B, C, h, w]."""
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        out: Tensor = self.resnets[1](x, time)
        return out


class UpBlock(nn.Module):
    """One level on the way up: every resnet also sees a state of the way down."""

    def __init__(self, shape: UNetShape, level: int) -> None:
        super().__init__()
        width = shape.widths[level]
        below = shape.widths[min(level + 1, len(shape.widths) - 1)]
        above = shape.widths[max(level - 1, 0)]
        count = shape.layers_per_level + 1
        self.attentions = _transformers(shape, level, count)
        self.resnets = nn.ModuleList()
        for i in range(count):
            skip = above if i == count - 1 else width
            self.resnets.append(ResnetBlock2D((below if i == 0 else width) + skip, width, shape.time_dim))
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample2D(width)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, size: tuple[int, int], *skips: Tensor) -> Tensor:
        """Takes x [B, C, h, w], one skip per resnet in the order of use -> [B, C', *size]."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


def _transformers(shape: UNetShape, level: int, count: int) -> nn.ModuleList | None:
    """One transformer per resnet of a level, or none."""
    if shape.depths[level] == 0:
        return None
    width, heads, depth = shape.widths[level], shape.num_heads[level], shape.depths[level]
    return nn.ModuleList(
        Transformer2DModel(width, heads, shape.context_dim, depth, shape.use_linear) for _ in range(count)
    )
