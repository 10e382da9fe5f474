"""What training asks of a diffusion process: noise a latent, name the target, weigh the loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Draws:
    """The random streams of one training step; two equal ones give the same noise and timesteps.

    `noise` lives on the device of the latents, `timesteps` on the CPU. On the CPU both are one generator, so
    that the order of draws is the order in which they are asked for.
    """

    noise: torch.Generator
    timesteps: torch.Generator
    scalars: random.Random
    drawn: list[Tensor] = field(default_factory=list)
    """Timesteps 0..1000 that were drawn so far, [B] each, still on the CPU: reading them waits for nothing."""

    @staticmethod
    def seeded(seed: int, device: torch.device | str = "cpu") -> Draws:
        """Streams that depend on nothing but `seed` and the kind of `device`."""
        timesteps = torch.Generator().manual_seed(seed)
        on_cpu = torch.device(device).type == "cpu"
        noise = timesteps if on_cpu else torch.Generator(device).manual_seed(seed)
        return Draws(noise, timesteps, random.Random(seed))


@dataclass
class Noised:
    """A batch of latents on their way between image and noise."""

    x: Tensor
    """[B, C, h, w] what the denoiser sees."""
    t: Tensor
    """[B] the timestep, in the units of the process, on the device of `x`."""
    noise: Tensor
    """[B, C, h, w] the noise that a prediction is measured against."""
    sigmas: Tensor | None = None
    """[B, 1, 1, 1] noise levels of a flow process."""

    def rows(self, rows: Sequence[int]) -> Noised:
        """The sub-batch `rows`."""
        rows = list(rows)
        sigmas = None if self.sigmas is None else self.sigmas[rows]
        return Noised(self.x[rows], self.t[rows], self.noise[rows], sigmas)


class Process(Protocol):
    """Noise on latents [B, C, h, w] and what a denoiser is trained to answer."""

    def add_noise(self, latents: Tensor, draws: Draws, t: float | None = None) -> Noised:
        """Noise `latents` at timesteps drawn from `draws`, or at `t` for every row."""
        ...

    def prediction(self, raw: Tensor, noised: Noised) -> Tensor:
        """The denoiser's raw answer, brought to the space in which the loss is taken."""
        ...

    def target(self, latents: Tensor, noised: Noised) -> Tensor:
        """What the prediction should have been, [B, C, h, w]."""
        ...

    def elementwise_loss(self, prediction: Tensor, target: Tensor, noised: Noised) -> Tensor:
        """The loss of every element, [B, C, h, w], before masks and means."""
        ...

    def weigh(self, loss: Tensor, noised: Noised) -> Tensor:
        """Per-sample losses [B] times the weight of their timestep."""
        ...
