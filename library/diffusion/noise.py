"""The noise that latents are trained with: plain, offset, multi-resolution, and the extra noise of the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.diffusion.process import Draws
from library.flags.objective import NoiseFlags


def draw_noise(latents: Tensor, flags: NoiseFlags, draws: Draws) -> Tensor:
    """Float32 noise [B, C, h, w] for `latents`; offset and multi-resolution noise are added when asked for.

    Draws in this order: the noise, the strength of the offset, the offset, then each level of the pyramid.
    """
    noise = standard_normal(latents.shape, latents, draws)
    if flags.noise_offset:
        noise = noise + _offset(latents, flags, draws)
    if flags.multires_noise_iterations:
        noise = _multires(noise, flags.multires_noise_iterations, flags.multires_noise_discount, draws)
    return noise


def perturb(noise: Tensor, flags: NoiseFlags, draws: Draws) -> Tensor:
    """The noise [B, C, h, w] that is mixed into the input; the target keeps the noise without --ip_noise_gamma."""
    if not flags.ip_noise_gamma:
        return noise
    strength = drawn_strength(flags.ip_noise_gamma, flags.ip_noise_gamma_random_strength, noise, draws)
    return noise + strength * standard_normal(noise.shape, noise, draws)


def drawn_strength(value: float, is_random: bool, like: Tensor, draws: Draws) -> Tensor | float:
    """`value`, or a share of it drawn on the device, so that the host never waits for the number."""
    if not is_random:
        return value
    return value * torch.rand(1, generator=draws.noise, device=like.device)


def standard_normal(shape: tuple[int, ...] | torch.Size, like: Tensor, draws: Draws) -> Tensor:
    """Float32 noise of mean 0 and variance 1 on the device of `like`."""
    return torch.randn(shape, generator=draws.noise, device=like.device)


def _offset(latents: Tensor, flags: NoiseFlags, draws: Draws) -> Tensor:
    """One value per image and channel, [B, C, 1, 1], so that a model can learn very dark and very bright images."""
    assert flags.noise_offset is not None
    strength = drawn_strength(flags.noise_offset, flags.noise_offset_random_strength, latents, draws)
    if flags.adaptive_noise_scale:
        brightness = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + flags.adaptive_noise_scale * brightness).clamp(min=0.0)
    return strength * standard_normal((*latents.shape[:2], 1, 1), latents, draws)


def _multires(noise: Tensor, iterations: int, discount: float, draws: Draws) -> Tensor:
    """Noise of ever smaller size added to `noise`, scaled back to standard deviation 1 over the whole tensor.

    Level 0 has full size. The first level with a side of one element is the last.
    """
    height, width = noise.shape[2:]
    total = noise
    for level in range(iterations):
        shrink = (2 + 2 * draws.scalars.random()) ** level
        h, w = max(1, int(height / shrink)), max(1, int(width / shrink))
        small = standard_normal((*noise.shape[:2], h, w), noise, draws)
        total = total + interpolate(small, (height, width), mode="bilinear") * discount**level
        if h == 1 or w == 1:
            break
    return total / total.std()
