"""The U-Net of Stable Diffusion XL.

Modules are named as in the published single file, since everybody's LoRA and ControlNet-LLLite names come from there;
classes as in diffusers, since network modules of others choose the layers they adapt by them.
"SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", https://arxiv.org/abs/2307.01952
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode
from library.models.embeddings import timestep_embedding
from library.models.norms import GroupNorm
from library.models.resnet import Upsample2D
from library.models.spatial_transformer import CrossAttention, Transformer2DModel

HEAD_DIM = 64
"""Width of an attention head, at every level."""


@dataclass(frozen=True)
class UNetShape:
    """Everything that decides the weights of a U-Net; one entry per level, from full resolution down."""

    widths: tuple[int, ...]
    """Channels of each level; every level but the last halves height and width."""
    depths: tuple[int, ...]
    """Transformer blocks after each resnet; 0 for a level that does not see the text."""
    mid_depth: int
    layers_per_level: int
    """Resnets on the way down; there is one more on the way up."""
    context_dim: int
    vector_dim: int
    """Width of the vector that tells sizes and the pooled text."""
    time_dim: int
    in_channels: int = 4
    out_channels: int = 4


class SdxlUNet(nn.Module):
    """Answers noisy latents with the noise in them."""

    def __init__(self, shape: UNetShape, attention: AttentionMode = AttentionMode.SDPA) -> None:
        super().__init__()
        self.shape = shape
        width, time = shape.widths[0], shape.time_dim
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        vector = nn.Sequential(nn.Linear(shape.vector_dim, time), nn.SiLU(), nn.Linear(time, time))
        self.label_emb = nn.Sequential(vector)
        self.input_blocks, skips = _way_down(shape)
        self.middle_block = _middle(shape)
        self.output_blocks = _way_up(shape, skips)
        self.out = nn.Sequential(
            GroupNorm(32, width, eps=1e-5), nn.SiLU(), nn.Conv2d(width, shape.out_channels, 3, padding=1)
        )
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.mode = attention

    def blocks(self) -> list[nn.Module]:
        """The blocks in running order, each of which can be recomputed in backward."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """Takes x [B, 4, h, w], t [B] in 0..999, context [B, T, D], vector [B, vector_dim] -> [B, 4, h, w]."""
        time = self.time_embed(timestep_embedding(t, self.shape.widths[0]).to(x.dtype))
        time = F.silu(time + self.label_emb(vector.to(x.dtype)))
        skips = []
        for block in self.input_blocks:
            x = block(x, time, context)
            skips.append(x)
        x = self.middle_block(x, time, context)
        for block in self.output_blocks:
            skip = skips.pop()
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = block(x, time, context, skip, size)
        out: Tensor = self.out(x)
        return out


class UNetBlock(nn.ModuleList):
    """Layers that follow one another; each takes of the inputs what it needs.

    It is not called `Block`: by that name LyCORIS takes the blocks of another model, whose layers it then finds twice.
    """

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Takes x [B, C, h, w], time [B, time_dim] with SiLU applied, context [B, T, D] -> [B, C', h', w'].

        On the way up `skip` is the state of the way down that joins `x`, and `size` what an upsampler enlarges to.
        """
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResnetBlock2D):
                x = layer(x, time)
            elif isinstance(layer, Transformer2DModel):
                x = layer(x, context)
            elif isinstance(layer, Upsample2D):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions with the time added between them: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        # The published numbers count activations and dropouts; the time comes here with SiLU applied.
        self.in_layers = nn.Sequential(
            GroupNorm(32, in_channels, eps=1e-5), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Takes x [B, in, h, w], time [B, time_dim] -> [B, out, h, w]."""
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class Downsample2D(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)]"""
        out: Tensor = self.op(x)
        return out


def _way_down(shape: UNetShape) -> tuple[nn.ModuleList, list[int]]:
    """The input blocks, and the channels of the state that each leaves."""
    width = shape.widths[0]
    blocks, skips = [UNetBlock([nn.Conv2d(shape.in_channels, width, 3, padding=1)])], [width]
    for level, wide in enumerate(shape.widths):
        for _ in range(shape.layers_per_level):
            layers: list[nn.Module] = [ResnetBlock2D(width, wide, shape.time_dim)]
            width = wide
            if shape.depths[level]:
                layers.append(_transformer(shape, width, shape.depths[level]))
            blocks.append(UNetBlock(layers))
            skips.append(width)
        if level < len(shape.widths) - 1:
            blocks.append(UNetBlock([Downsample2D(width)]))
            skips.append(width)
    return nn.ModuleList(blocks), skips


def _middle(shape: UNetShape) -> UNetBlock:
    width, time = shape.widths[-1], shape.time_dim
    transformer = _transformer(shape, width, shape.mid_depth)
    return UNetBlock([ResnetBlock2D(width, width, time), transformer, ResnetBlock2D(width, width, time)])


def _way_up(shape: UNetShape, skips: list[int]) -> nn.ModuleList:
    """The output blocks; `skips` are the channels of the states of the way down, of which each takes the last."""
    blocks, width, left = [], shape.widths[-1], list(skips)
    for level in reversed(range(len(shape.widths))):
        for i in range(shape.layers_per_level + 1):
            layers: list[nn.Module] = [ResnetBlock2D(width + left.pop(), shape.widths[level], shape.time_dim)]
            width = shape.widths[level]
            if shape.depths[level]:
                layers.append(_transformer(shape, width, shape.depths[level]))
            if level > 0 and i == shape.layers_per_level:
                layers.append(Upsample2D(width))
            blocks.append(UNetBlock(layers))
    return nn.ModuleList(blocks)


def _transformer(shape: UNetShape, width: int, depth: int) -> Transformer2DModel:
    return Transformer2DModel(width, max(1, width // HEAD_DIM), shape.context_dim, depth, use_linear=True)
