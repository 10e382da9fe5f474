"""How a picture of FLUX.1 or Chroma is made: its size and steps, its noise, its guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from library.diffusion.flow import PATCH, log_shift, tokens_of
from library.diffusion.flow_sampling import integrate, sampling_schedule
from library.diffusion.guidance import guided
from library.models.architecture import Condition, ImageRequest
from library.models.flux.patches import unpack

GRID = 16
"""Sides are multiples of this many pixels: 8 of the autoencoder times 2 of the patches."""
SMALLEST = 64

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""x [B, C, h, w] in float32, t [B] from 1000 to 0, what the denoiser is told -> the velocity [B, C, h, w]."""


def completed(request: ImageRequest) -> ImageRequest:
    """512x512, 20 steps, guidance 3.5 and no second guidance where `request` says nothing; sides floored to 16."""
    return replace(
        request,
        width=to_grid(request.width or 512),
        height=to_grid(request.height or 512),
        steps=request.steps or 20,
        scale=1.0 if request.scale is None else request.scale,
        guidance_scale=3.5 if request.guidance_scale is None else request.guidance_scale,
    )


def to_grid(side: int) -> int:
    """`side` floored to the grid, at least 64 pixels."""
    return max(SMALLEST, side - side % GRID)


def packed_noise(seed: int, height: int, width: int, channels: int) -> Tensor:
    """Noise [1, C, height / 8, width / 8] on the CPU for a picture of that many pixels.

    It is drawn token by token, [1, tokens, 4 C], and laid out after that, so that a seed means the same picture as
    in other programs.
    """
    size = (height // GRID, width // GRID)
    generator = torch.Generator().manual_seed(seed)
    return unpack(torch.randn(1, size[0] * size[1], channels * PATCH * PATCH, generator=generator), size)


def denoised(
    predict: Predict, noise: Tensor, cond: Condition, uncond: Condition | None, request: ImageRequest
) -> Tensor:
    """Latents [1, C, h, w] in float32 of a complete `request`, from `noise` of that shape.

    A scale other than 1 asks the denoiser with and without the prompt, in one batch. The schedule is shifted by the
    size of the picture, or by `flow_shift` of the extras; 1 shifts nothing, which is what schnell was distilled for.
    """
    assert request.steps is not None and request.scale is not None and request.guidance_scale is not None
    scale = request.scale
    shift = request.extras.get("flow_shift") or math.exp(log_shift(tokens_of(noise)))
    guides = uncond is not None and scale != 1.0
    told = cond.followed_by(uncond) if uncond is not None and guides else cond
    rows = 2 if guides else 1
    told = replace(told, guidance=torch.full((rows,), request.guidance_scale, device=noise.device))

    def model(x: Tensor, t: Tensor) -> Tensor:
        answer = predict(x.expand(rows, -1, -1, -1), t.expand(rows), told).float()
        return guided(answer[:1], answer[1:], scale) if guides else answer

    return integrate(model, sampling_schedule(request.steps, shift), noise)
