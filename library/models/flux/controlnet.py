"""A ControlNet for FLUX.1: a second picture steers the double blocks of the transformer.

The layout of https://huggingface.co/XLabs-AI/flux-controlnet-collections, which is not that of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode
from library.models.flux.model import TIME_DIM, FluxShape, MLPEmbedder, conditioning, set_attention, without_padding
from library.models.flux.patches import pack
from library.models.flux.rope import RopeTables
from library.models.flux.stream import DoubleStreamBlock

HINT_CHANNELS = 16


class FluxControlNet(nn.Module):
    """The first double blocks of FLUX.1 once more, whose image states go out through linear layers."""

    def __init__(self, shape: FluxShape, attention: AttentionMode = AttentionMode.SDPA) -> None:
        super().__init__()
        self.shape = shape
        block = (shape.width, shape.num_heads, shape.mlp_width)
        self.img_in = nn.Linear(shape.in_channels, shape.width)
        self.time_in = MLPEmbedder(TIME_DIM, shape.width)
        self.vector_in = MLPEmbedder(shape.pooled_dim, shape.width)
        self.guidance_in = MLPEmbedder(TIME_DIM, shape.width) if shape.has_guidance else None
        self.txt_in = nn.Linear(shape.text_dim, shape.width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*block) for _ in range(shape.double_blocks))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(shape.double_blocks))
        self.pos_embed_input = nn.Linear(shape.in_channels, shape.width)
        self.input_hint_block = hint_layers(shape.in_channels // 4)
        self.rope = RopeTables(shape.width // shape.num_heads)
        set_attention(self, attention)

    def forward(
        self,
        img: Tensor,
        control: Tensor,
        txt: Tensor,
        t: Tensor,
        guidance: Tensor | None,
        pooled: Tensor,
        size: tuple[int, int],
        lengths: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """One residual [B, L, C] for each double block.

        `control` is [B, 3, H, W] in [-1, 1], the rest as in `FluxTransformer`.
        """
        txt, keys = without_padding(txt, lengths, img.shape[1])
        vector = conditioning(self.time_in, self.guidance_in, self.vector_in, t, guidance, pooled, img.dtype)
        vector = F.silu(vector)
        rope = self.rope(size, txt.shape[1], img.device)
        hint = self.input_hint_block(control)
        img = self.img_in(img) + self.pos_embed_input(pack(hint))
        txt = self.txt_in(txt)
        residuals = []
        for block, out in zip(cast(Iterable[DoubleStreamBlock], self.double_blocks), self.controlnet_blocks):
            img, txt = block(img, txt, block.img_mod(vector), block.txt_mod(vector), rope, keys)
            residuals.append(out(img))
        return residuals


def hint_layers(channels: int) -> nn.Sequential:
    """A picture [B, 3, H, W] -> [B, channels, H / 8, W / 8], as many values as its latents have."""
    layers: list[nn.Module] = [nn.Conv2d(3, HINT_CHANNELS, 3, padding=1)]
    for stride in (1, 2, 1, 2, 1, 2):
        layers += [nn.SiLU(), nn.Conv2d(HINT_CHANNELS, HINT_CHANNELS, 3, padding=1, stride=stride)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(HINT_CHANNELS, channels, 3, padding=1))
