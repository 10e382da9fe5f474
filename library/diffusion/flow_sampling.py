"""From noise to latents with a flow model: the noise levels of a picture's steps, and the loop over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.diffusion.flow import NUM_TIMESTEPS, shifted


def sampling_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """[steps + 1] float32 noise levels from 1 (noise) to 0 (the picture), moved towards noise by `shift`."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def integrate(model: Callable[[Tensor, Tensor], Tensor], schedule: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, h, w] in float32, from `noise` along the velocities that `model` gives (Euler's method).

    `model` takes x in float32 and the timestep [B], 1000 to 0, and answers with the velocity from picture to noise.
    It is called once for each step, never at 0. `schedule` [steps + 1] lies on the CPU.
    """
    levels = schedule.tolist()
    x = noise.float()
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        t = torch.full((len(x),), NUM_TIMESTEPS * level, device=x.device)
        x = x + (following - level) * model(x, t).float()
    return x
