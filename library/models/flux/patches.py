"""Latents as rows of patches: what the transformer calls a token."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h * w, 4C]: channels, then rows, then columns within a patch."""
    return latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h * w, 4C] -> [B, C, 2h, 2w]; the inverse of `pack`."""
    patches = tokens.unflatten(1, size).unflatten(3, (-1, 2, 2))  # [B, h, w, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
