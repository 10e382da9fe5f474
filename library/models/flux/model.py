"""FLUX.1 and its kin: patches of latents and a text in, patches of the velocity out.

Modules are named as in the published single files. "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis" (https://arxiv.org/abs/2403.03206), https://github.com/black-forest-labs/flux
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.attention import AttentionMode, KeyCounts
from library.models.embeddings import timestep_embedding
from library.models.flux.rope import RopeTables
from library.models.flux.stream import DoubleStreamBlock, LastLayer, SingleStreamBlock

TIME_DIM = 256
"""Width of the sinusoids of time and guidance."""
TEXT_STEP = 32
"""Texts are cut at multiples of this many tokens."""
TIME_FACTOR = 1000.0
"""Time and guidance are multiplied by this before they become sinusoids."""


@dataclass(frozen=True)
class FluxShape:
    """Everything that decides the weights of a FLUX.1 or Chroma transformer, a ControlNet included."""

    in_channels: int
    """Channels of a patch of 2x2 latents."""
    width: int
    num_heads: int
    mlp_width: int
    text_dim: int
    double_blocks: int
    single_blocks: int
    pooled_dim: int = 0
    """Width of the pooled text; 0 for a model that takes none (Chroma)."""
    has_guidance: bool = False
    """The guidance scale is an input (dev), not left out (schnell)."""
    guidance_in_dim: int = 0
    """Inputs of the layer that makes all modulations, Chroma only."""
    guidance_width: int = 0
    guidance_depth: int = 0


@dataclass
class Modulations:
    """What the blocks are conditioned on, in the order of the blocks; see `DoubleStreamBlock`."""

    img: Sequence[Tensor]
    """One for each double block."""
    txt: Sequence[Tensor]
    single: Sequence[Tensor]
    last: Tensor


class StreamTransformer(nn.Module, ABC):
    """Double blocks, single blocks, and the layers before and after; subclasses say how time conditions them."""

    def __init__(self, shape: FluxShape, has_modulation: bool, attention: AttentionMode) -> None:
        super().__init__()
        self.shape = shape
        block = (shape.width, shape.num_heads, shape.mlp_width, has_modulation)
        self.img_in = nn.Linear(shape.in_channels, shape.width)
        self.txt_in = nn.Linear(shape.text_dim, shape.width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*block) for _ in range(shape.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*block) for _ in range(shape.single_blocks))
        self.final_layer = LastLayer(shape.width, shape.in_channels, has_modulation)
        self.rope = RopeTables(shape.width // shape.num_heads)
        set_attention(self, attention)

    @abstractmethod
    def modulations(self, t: Tensor, guidance: Tensor | None, pooled: Tensor | None, dtype: torch.dtype) -> Modulations:
        """What time [B] in 0..1, guidance [B] and the pooled text [B, P] tell every block."""

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        t: Tensor,
        guidance: Tensor | None,
        pooled: Tensor | None,
        size: tuple[int, int],
        lengths: Sequence[int] | None = None,
        residuals: Sequence[Tensor] = (),
        single_residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity [B, L, in_channels] at time `t`.

        Args:
            img: [B, L, in_channels] patches, row by row.
            txt: [B, T, text_dim]
            t: [B] 0 is the image, 1 is noise.
            guidance: [B], for models that have it.
            pooled: [B, pooled_dim], for models that take it.
            size: rows and columns of patches; their product is L.
            lengths: text tokens that count in each row; None is all of them.
            residuals: [B, L, C] each, added to the image after the double blocks, in turn.
            single_residuals: [B, T + L, C] each, text first, added after the single blocks, in turn.
        """
        txt, keys = without_padding(txt, lengths, img.shape[1])
        mods = self.modulations(t, guidance, pooled, img.dtype)
        rope = self.rope(size, txt.shape[1], img.device)
        image_tokens, text_tokens = img.shape[1], txt.shape[1]
        img, txt = self.img_in(img), self.txt_in(txt)
        for i, block in enumerate(cast(Iterable[DoubleStreamBlock], self.double_blocks)):
            img, txt = block(img, txt, block.img_mod(mods.img[i]), block.txt_mod(mods.txt[i]), rope, keys)
            if residuals:
                img = img + residuals[i % len(residuals)]
        x = torch.cat([img, txt], dim=1)
        after = [image_first(residual, image_tokens, text_tokens) for residual in single_residuals]
        for i, one in enumerate(cast(Iterable[SingleStreamBlock], self.single_blocks)):
            x = one(x, one.modulation(mods.single[i]), rope, keys)
            if after:
                x = x + after[i % len(after)]
        out: Tensor = self.final_layer(x[:, :image_tokens], mods.last)
        return out


class FluxTransformer(StreamTransformer):
    """FLUX.1: every block turns one vector, made of time, guidance and pooled text, into its modulation."""

    def __init__(self, shape: FluxShape, attention: AttentionMode = AttentionMode.SDPA) -> None:
        super().__init__(shape, has_modulation=True, attention=attention)
        self.time_in = MLPEmbedder(TIME_DIM, shape.width)
        self.vector_in = MLPEmbedder(shape.pooled_dim, shape.width)
        self.guidance_in = MLPEmbedder(TIME_DIM, shape.width) if shape.has_guidance else None

    def modulations(self, t: Tensor, guidance: Tensor | None, pooled: Tensor | None, dtype: torch.dtype) -> Modulations:
        """The same vector [B, C] for all of them."""
        vector = conditioning(self.time_in, self.guidance_in, self.vector_in, t, guidance, pooled, dtype)
        vector = F.silu(vector)
        double, single = [vector] * self.shape.double_blocks, [vector] * self.shape.single_blocks
        return Modulations(double, double, single, vector)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between them: [B, in_dim] -> [B, width]."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """-> [B, width]"""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


def conditioning(
    time_in: MLPEmbedder,
    guidance_in: MLPEmbedder | None,
    vector_in: MLPEmbedder,
    t: Tensor,
    guidance: Tensor | None,
    pooled: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The vector [B, C] that conditions all blocks of FLUX.1 and of its ControlNet, before any SiLU."""
    assert pooled is not None, "the pooled text is an input of this model"
    vector: Tensor = time_in(sinusoids(t, TIME_DIM).to(dtype))
    if guidance_in is not None:
        assert guidance is not None, "the guidance scale is an input of this model"
        vector = vector + guidance_in(sinusoids(guidance, TIME_DIM).to(dtype))
    return vector + vector_in(pooled)


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """`values` [B], such as times in 0..1 -> float32 [B, dim]."""
    return timestep_embedding(values * TIME_FACTOR, dim)


def without_padding(txt: Tensor, lengths: Sequence[int] | None, image_tokens: int) -> tuple[Tensor, KeyCounts | None]:
    """`txt` [B, T, D] cut to its longest row, and how many keys each row looks at; None where that is all of them.

    It is cut at a multiple of 32 tokens: captions have any length, and each other shape costs a compiler a program and
    the allocator a piece of memory.
    """
    if lengths is None:
        return txt, None
    tokens = min(-(-max(lengths) // TEXT_STEP) * TEXT_STEP, txt.shape[1])
    everything = min(lengths) == tokens
    return txt[:, :tokens], None if everything else KeyCounts([image_tokens + length for length in lengths])


def image_first(x: Tensor, image_tokens: int, text_tokens: int) -> Tensor:
    """[B, T + L, C] with the text first -> [B, L + text_tokens, C]: the order of our blocks, the text as long."""
    whole_text = x.shape[1] - image_tokens
    return torch.cat([x[:, whole_text:], x[:, :text_tokens]], dim=1)


def set_attention(model: nn.Module, mode: AttentionMode) -> None:
    """Use `mode` in every block of `model`."""
    for module in model.modules():
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
            module.mode = mode
