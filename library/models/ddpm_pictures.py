"""Pictures of the U-Nets that were trained with the noise schedule of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from library.diffusion.guidance import guided
from library.diffusion.samplers import Scheduler, denoise
from library.files.formats import LatentFormat
from library.models.architecture import Condition, ImageRequest

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""Latents [B, C, h, w], times [B] and what the U-Net is told besides -> its answer [B, C, h, w]."""

SIDE_MULTIPLE, SMALLEST_SIDE = 8, 64


def denoised(
    predict: Predict,
    cond: Condition,
    uncond: Condition | None,
    request: ImageRequest,
    scheduler: Scheduler,
    latents: LatentFormat,
) -> Tensor:
    """Latents [1, C, h, w] of unit variance for `request`, which is complete, by the sampler `scheduler`."""
    assert request.width and request.height and request.steps, "a complete request"
    assert request.scale is not None and request.seed is not None, "a complete request"
    text, scale = next(iter(cond.text.values())), request.scale
    generator = torch.Generator().manual_seed(request.seed)
    size = (1, latents.channels, request.height // latents.stride, request.width // latents.stride)
    noise = torch.randn(size, generator=generator).to(text.device)
    both = cond.followed_by(uncond) if uncond is not None and scale > 1.0 else None

    def model(x: Tensor, t: Tensor) -> Tensor:
        # The sampler keeps its latents in float32; the U-Net takes what the text encoders give.
        x = x.to(text.dtype)
        if both is None:
            return predict(x, t, cond)
        with_prompt, without = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guided(with_prompt, without, scale)

    return denoise(scheduler, request.steps, model, noise, generator)


def completed(request: ImageRequest, sampler: str, side: int) -> ImageRequest:
    """`request` at `side` x `side`, in 30 steps and with scale 7.5 where it says nothing; sides floored to 8."""
    return replace(
        request,
        width=_to_grid(request.width or side),
        height=_to_grid(request.height or side),
        steps=request.steps or 30,
        scale=7.5 if request.scale is None else request.scale,
        sampler=sampler,
    )


def _to_grid(side: int) -> int:
    return max(SMALLEST_SIDE, side - side % SIDE_MULTIPLE)
