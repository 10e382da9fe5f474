"""The diffusion process of Stable Diffusion 1, 2 and XL: its schedule, its targets and the weights of its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.loss import THRESHOLD_LOSSES, elementwise, thresholds
from library.diffusion.noise import draw_noise, perturb
from library.diffusion.process import Draws, Noised
from library.flags.objective import LossFlags, NoiseFlags

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
MAX_SNR = 1000.0
"""SNR above this counts as this in the weights: at the first timesteps it would be over a thousand."""


class DDPM:
    """`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise` at integer timesteps 0..999, with noise or velocity as the target.

    Ho et al., "Denoising Diffusion Probabilistic Models" (2020); velocity: Salimans and Ho (2022); zero terminal
    SNR: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023); min-SNR: Hang et al.
    (2023). Raises ValueError for timesteps outside 0..1000.
    """

    def __init__(self, noise: NoiseFlags, loss: LossFlags, v_parameterization: bool) -> None:
        self.noise = noise
        self.loss = loss
        self.v_parameterization = v_parameterization
        self.min_timestep, self.max_timestep = _timestep_range(noise)
        self.betas = scaled_linear_betas(noise.zero_terminal_snr)
        """[1000]"""
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        """[1000] the share of the image's variance that is left, a_t."""
        self.snr = signal_to_noise(self.alphas_cumprod)
        """[1000] of the schedule in use; its last value is 0 with --zero_terminal_snr."""
        self._tables = {torch.device("cpu"): self._build_tables()}

    def add_noise(self, latents: Tensor, draws: Draws, t: float | None = None) -> Noised:
        """Noise `latents` at timesteps drawn from `draws`, or at `t` for every row.

        Draws in this order: the noise and its options, the timesteps, the extra noise of the input.
        """
        noise = draw_noise(latents, self.noise, draws)
        timesteps = self._timesteps(len(latents), latents.device, draws, t)
        tables = self._on(latents.device)
        signal = tables.signal[timesteps].view(-1, 1, 1, 1)
        sigma = tables.noise[timesteps].view(-1, 1, 1, 1)
        x = signal * latents + sigma * perturb(noise, self.noise, draws)
        return Noised(x.to(latents.dtype), timesteps, noise)

    def prediction(self, raw: Tensor, noised: Noised) -> Tensor:
        """The denoiser's answer [B, C, h, w], in float32: it already lies in the space of the loss."""
        return raw.float()

    def target(self, latents: Tensor, noised: Noised) -> Tensor:
        """The noise, or with v-parameterization the velocity `sqrt(a) noise - sqrt(1 - a) x_0`; a new tensor."""
        if not self.v_parameterization:
            return noised.noise.clone()
        tables = self._on(latents.device)
        signal = tables.signal[noised.t].view(-1, 1, 1, 1)
        sigma = tables.noise[noised.t].view(-1, 1, 1, 1)
        return signal * noised.noise - sigma * latents

    def elementwise_loss(self, prediction: Tensor, target: Tensor, noised: Noised) -> Tensor:
        """The loss of every element, [B, C, h, w], by --loss_type."""
        table = self._on(prediction.device).thresholds
        threshold = None if table is None else table[noised.t]
        return elementwise(prediction, target, self.loss.loss_type, threshold)

    def weigh(self, loss: Tensor, noised: Noised) -> Tensor:
        """Per-sample losses [B] times the weight of their timestep."""
        weights = self._on(loss.device).weights
        return loss if weights is None else loss * weights[noised.t]

    def _timesteps(self, count: int, device: torch.device, draws: Draws, t: float | None) -> Tensor:
        """[count] int64 on `device`; drawn on the CPU, so that every device trains on the same ones."""
        if t is not None:
            fixed = min(max(round(t), 0), NUM_TIMESTEPS - 1)
            return torch.full((count,), fixed, dtype=torch.int64, device=device)
        if self.min_timestep >= self.max_timestep:
            return torch.full((count,), self.max_timestep, dtype=torch.int64, device=device)
        drawn = torch.randint(self.min_timestep, self.max_timestep, (count,), generator=draws.timesteps)
        draws.drawn.append(drawn)
        return drawn.to(device, non_blocking=True)

    def _on(self, device: torch.device) -> _Tables:
        """The tables on `device`, copied there once, so that no step moves numbers between host and device."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _build_tables(self) -> _Tables:
        t = torch.arange(NUM_TIMESTEPS)
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()  # infinite at zero SNR
        has_threshold = self.loss.loss_type in THRESHOLD_LOSSES
        return _Tables(
            signal=self.alphas_cumprod.sqrt(),
            noise=(1 - self.alphas_cumprod).sqrt(),
            weights=timestep_weights(self.snr, self.loss, self.v_parameterization),
            thresholds=thresholds(self.loss, t, sigmas) if has_threshold else None,
        )


@dataclass(frozen=True)
class _Tables:
    """Per-timestep numbers, [1000] each; None where every value would be 1 or is not needed."""

    signal: Tensor
    noise: Tensor
    weights: Tensor | None
    thresholds: Tensor | None

    def to(self, device: torch.device) -> _Tables:
        def move(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.to(device)

        return _Tables(self.signal.to(device), self.noise.to(device), move(self.weights), move(self.thresholds))


def scaled_linear_betas(zero_terminal_snr: bool) -> Tensor:
    """[1000] float32: the variances that the steps add, linear in their square root.

    With `zero_terminal_snr` the square root of the remaining signal is shifted to end at 0 and scaled to start
    where it did.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    if not zero_terminal_snr:
        return betas
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alphas_cumprod = ((signal - last) * (first / (first - last))).square()
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """`a / (1 - a)`, the variance of the image over that of the noise."""
    return alphas_cumprod / (1 - alphas_cumprod)


def timestep_weights(snr: Tensor, flags: LossFlags, v_parameterization: bool) -> Tensor | None:
    """[1000] the product of all weightings that `flags` ask for, or None when there is none.

    A weight that grows as the SNR falls to 0 stops growing at the last SNR of the plain schedule: with zero
    terminal SNR it would be infinite in the last step and over a thousand in the step before.
    """
    plain = signal_to_noise(torch.cumprod(1 - scaled_linear_betas(False), dim=0))
    capped = snr.clamp(max=MAX_SNR)
    floored = snr.clamp(min=float(plain[-1]), max=MAX_SNR)
    factors: list[Tensor] = []
    if flags.min_snr_gamma:
        # Written so that an SNR of 0 gives 1, the limit of min(snr, gamma) / snr.
        as_noise = (flags.min_snr_gamma / snr).clamp(max=1.0)
        factors.append(snr.clamp(max=flags.min_snr_gamma) / (snr + 1) if v_parameterization else as_noise)
    if flags.scale_v_pred_loss_like_noise_pred:
        factors.append(capped / (capped + 1))
    if flags.v_pred_like_loss:
        factors.append(1 + flags.v_pred_like_loss * (floored + 1) / floored)
    if flags.debiased_estimation_loss:
        factors.append(1 / (capped + 1) if v_parameterization else floored.rsqrt())
    if not factors:
        return None
    return torch.stack(factors).prod(dim=0)


def _timestep_range(flags: NoiseFlags) -> tuple[int, int]:
    """First timestep and the one after the last; equal or crossed ones mean the second, always."""
    first = 0 if flags.min_timestep is None else flags.min_timestep
    end = NUM_TIMESTEPS if flags.max_timestep is None else flags.max_timestep
    if first < 0 or end < 0 or end > NUM_TIMESTEPS or (first >= end and end == NUM_TIMESTEPS):
        raise ValueError(
            f"--min_timestep {flags.min_timestep} and --max_timestep {flags.max_timestep} name no timestep: "
            f"give values from 0 to {NUM_TIMESTEPS - 1}, and up to {NUM_TIMESTEPS} for --max_timestep"
        )
    return first, end
