"""The flow matching of FLUX, Lumina and HunyuanImage: noise levels, targets and the weights of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from library.diffusion.loss import THRESHOLD_LOSSES, elementwise, thresholds
from library.diffusion.noise import drawn_strength, standard_normal
from library.diffusion.process import Draws, Noised
from library.flags.flow import FlowFlags, WeightingFlags
from library.flags.objective import LossFlags, NoiseFlags

NUM_TIMESTEPS = 1000
PATCH = 2
"""Side of a token in latents: the shift by image size counts tokens."""
FEW_TOKENS, FEW_TOKENS_SHIFT = 256, 0.5
MANY_TOKENS, MANY_TOKENS_SHIFT = 4096, 1.15
"""Where the shift by image size is fixed; it is linear in the number of tokens, also outside."""
SMALLEST_WEIGHED_SIGMA = 1 / NUM_TIMESTEPS
"""Below this the weight 1 / sigma^2 no longer grows: at sigma 0 it would be infinite."""


class FlowMatching:
    """`x = (1 - sigma) latents + sigma noise`, whose velocity `noise - latents` a denoiser learns.

    Lipman et al., "Flow Matching for Generative Modeling" (2022); Esser et al., "Scaling Rectified Flow Transformers
    for High-Resolution Image Synthesis" (2024) has the schedule, the densities and the weights. `Noised.t` is
    `1000 sigma`, rounded to `dtype`, that of the denoiser's weights; the sigmas themselves are rounded with
    `--timestep_sampling sigma` only.

    Raises ValueError for limits of timesteps that leave none.
    """

    def __init__(
        self,
        noise: NoiseFlags,
        loss: LossFlags,
        flow: FlowFlags,
        weighting: WeightingFlags,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.noise = noise
        self.loss = loss
        self.flow = flow
        self.weighting = weighting
        self.dtype = dtype
        self.low, self.high = _sigma_range(noise)

    def add_noise(self, latents: Tensor, draws: Draws, t: float | None = None) -> Noised:
        """Noise `latents` [B, C, h, w] at levels drawn from `draws`, or at `t`, 0 to 1000, for every row.

        Draws in this order: the noise, the noise levels, the extra noise of the input, its strength.
        """
        noise = standard_normal(latents.shape, latents, draws)
        if t is None:
            drawn = self.draw_sigmas(len(latents), tokens_of(latents), draws)
            draws.drawn.append(NUM_TIMESTEPS * drawn)
            sigmas = drawn.to(latents.device, non_blocking=True)
        else:
            sigmas = torch.full((len(latents),), t / NUM_TIMESTEPS, device=latents.device)
        timesteps = (NUM_TIMESTEPS * sigmas).to(self.dtype)
        sigmas = sigmas.to(self.dtype if self.flow.timestep_sampling == "sigma" else torch.float32).view(-1, 1, 1, 1)
        x = (1 - sigmas) * latents + sigmas * self._perturbed(noise, draws)
        return Noised(x.to(self.dtype), timesteps, noise, sigmas.float())

    def prediction(self, raw: Tensor, noised: Noised) -> Tensor:
        """The denoiser's answer [B, C, h, w] as --model_prediction_type takes it, in float32."""
        raw = raw.float()
        if self.flow.model_prediction_type == "raw":
            return raw
        if self.flow.model_prediction_type == "additive":
            return raw + noised.x
        assert noised.sigmas is not None
        return noised.x - noised.sigmas * raw

    def target(self, latents: Tensor, noised: Noised) -> Tensor:
        """The velocity [B, C, h, w], whatever the prediction is taken for; a new tensor."""
        return noised.noise - latents

    def elementwise_loss(self, prediction: Tensor, target: Tensor, noised: Noised) -> Tensor:
        """The loss of every element, [B, C, h, w], by --loss_type."""
        return elementwise(prediction, target, self.loss.loss_type, self._thresholds(noised))

    def weigh(self, loss: Tensor, noised: Noised) -> Tensor:
        """Per-sample losses [B] times the weight of their noise level; only sigma_scaled predictions have any."""
        if self.flow.model_prediction_type != "sigma_scaled":
            return loss
        assert noised.sigmas is not None
        weights = loss_weights(self.weighting.weighting_scheme, noised.sigmas.flatten().float())
        return loss if weights is None else loss * weights

    def draw_sigmas(self, count: int, num_tokens: int, draws: Draws) -> Tensor:
        """[count] float32 noise levels between 0 (image) and 1 (noise) on the CPU, for images of `num_tokens` tokens.

        --min_timestep and --max_timestep squeeze the whole distribution between them.
        """
        sampling = self.flow.timestep_sampling
        drawn = self._from_schedule(count, draws) if sampling == "sigma" else self._direct(count, num_tokens, draws)
        return drawn if (self.low, self.high) == (0.0, 1.0) else self.low + (self.high - self.low) * drawn

    def _from_schedule(self, count: int, draws: Draws) -> Tensor:
        """[count] entries of the shifted schedule of 1000 steps."""
        positions = draw_positions(count, self.weighting, draws.timesteps)
        index = (positions * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
        return self.schedule[index]

    def _direct(self, count: int, num_tokens: int, draws: Draws) -> Tensor:
        """[count] float32 noise levels of the other kinds of --timestep_sampling."""
        source, shift = _DIRECT[self.flow.timestep_sampling]
        if source == "uniform":
            drawn = torch.rand(count, generator=draws.timesteps)
        else:
            drawn = torch.sigmoid(self.flow.sigmoid_scale * torch.randn(count, generator=draws.timesteps))
        if shift == "by_flag":
            return shifted(drawn, self.flow.discrete_flow_shift)
        return drawn if shift == "none" else shifted(drawn, math.exp(log_shift(num_tokens)))

    @cached_property
    def schedule(self) -> Tensor:
        """[1000] noise levels, from 1 down."""
        sigmas = torch.arange(NUM_TIMESTEPS, 0, -1, dtype=torch.float32) / NUM_TIMESTEPS
        return shifted(sigmas, self.flow.discrete_flow_shift)

    def _perturbed(self, noise: Tensor, draws: Draws) -> Tensor:
        """The noise that is mixed into the input; the target keeps the noise without --ip_noise_gamma."""
        flags = self.noise
        if not flags.ip_noise_gamma:
            return noise
        extra = standard_normal(noise.shape, noise, draws)
        return noise + drawn_strength(flags.ip_noise_gamma, flags.ip_noise_gamma_random_strength, noise, draws) * extra

    def _thresholds(self, noised: Noised) -> Tensor | None:
        """[B] where huber and smooth_l1 turn linear; None for the other losses."""
        if self.loss.loss_type not in THRESHOLD_LOSSES:
            return None
        assert noised.sigmas is not None
        sigmas = noised.sigmas.flatten().float()
        return thresholds(self.loss, NUM_TIMESTEPS * sigmas, sigmas / (1 - sigmas))  # infinite for pure noise


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Noise levels from 0 to 1 moved towards 1 by a `shift` above 1, of any shape; the ends stay."""
    return sigmas * shift / (1 + (shift - 1) * sigmas)


def log_shift(num_tokens: int) -> float:
    """The logarithm of the shift for an image of `num_tokens` tokens: larger images need more noise."""
    slope = (MANY_TOKENS_SHIFT - FEW_TOKENS_SHIFT) / (MANY_TOKENS - FEW_TOKENS)
    return FEW_TOKENS_SHIFT + slope * (num_tokens - FEW_TOKENS)


def tokens_of(latents: Tensor) -> int:
    """How many tokens latents [B, C, h, w] are cut into, for the shift by image size."""
    return (latents.shape[2] // PATCH) * (latents.shape[3] // PATCH)


def draw_positions(count: int, flags: WeightingFlags, generator: torch.Generator) -> Tensor:
    """[count] places in the schedule, 0 (noise) to 1 (the image), with the density of --weighting_scheme."""
    if flags.weighting_scheme == "logit_normal":
        return torch.sigmoid(torch.normal(flags.logit_mean, flags.logit_std, (count,), generator=generator))
    u = torch.rand(count, generator=generator)
    if flags.weighting_scheme == "mode":
        u = 1 - u - flags.mode_scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
    return u


def loss_weights(scheme: str, sigmas: Tensor) -> Tensor | None:
    """The weights of --weighting_scheme at `sigmas` [B], or None where all of them are 1."""
    if scheme == "sigma_sqrt":
        return sigmas.clamp(min=SMALLEST_WEIGHED_SIGMA).pow(-2)
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
    return None


_DIRECT: Mapping[str, tuple[str, str]] = {
    "uniform": ("uniform", "none"),
    "sigmoid": ("sigmoid", "none"),
    "shift": ("sigmoid", "by_flag"),
    "flux_shift": ("sigmoid", "by_size"),
    "nextdit_shift": ("uniform", "by_size"),
}
"""--timestep_sampling -> what is drawn, and how it is shifted."""


def _sigma_range(flags: NoiseFlags) -> tuple[float, float]:
    """The lowest and the highest noise level."""
    low = flags.min_timestep or 0
    high = NUM_TIMESTEPS if flags.max_timestep is None else flags.max_timestep
    if not 0 <= low <= high <= NUM_TIMESTEPS:
        raise ValueError(
            f"--min_timestep {flags.min_timestep} and --max_timestep {flags.max_timestep} name no noise level: "
            f"give values from 0 to {NUM_TIMESTEPS}, the smaller one first"
        )
    return low / NUM_TIMESTEPS, high / NUM_TIMESTEPS
