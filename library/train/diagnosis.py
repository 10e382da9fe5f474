"""Why a loss is not a number any more: what the evidence says, the surest cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

import torch
from torch import Tensor

from library.data.items import Batch
from library.flags.model import ModelFlags
from library.flags.objective import NoiseFlags
from library.flags.run import PrecisionFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.state import Models

HIGH_RATE = 2e-3
"""Above this learning rates of networks are seldom meant; optimizers that estimate the rate start from 1."""


def likely_causes(
    settings: Settings,
    arch: Architecture,
    models: Models,
    batch: Batch,
    rates: Sequence[float],
    weights_are_finite: bool,
) -> list[str]:
    """Sentences with cause and cure, the surest first; never none."""
    causes = [*_of_images(batch, arch, models), *_of_settings(settings)]
    if rates and max(rates) > HIGH_RATE:
        causes.append(f"a learning rate of {max(rates):g} is high: try a tenth of it (--learning_rate, --unet_lr)")
    if not weights_are_finite and not causes:
        causes.append(
            "the trained weights themselves are not finite: try a lower --learning_rate, or --max_grad_norm=1"
        )
    return causes or ["nothing is known against images and settings: try a lower --learning_rate"]


def _of_images(batch: Batch, arch: Architecture, models: Models) -> Iterator[str]:
    """What is wrong with what the models are shown."""
    names = [PurePath(path).name for path in batch.paths]
    if batch.latents is not None:
        if broken := _broken(names, batch.latents):
            yield f"the cached latents of {broken} are not finite: delete their cache and use --no_half_vae"
    elif batch.pixels is not None and models.vae is not None:
        with torch.no_grad():
            parameter = next(models.vae.parameters())
            pixels = batch.to(parameter.device).pixels
            assert pixels is not None
            latents = arch.encode_image(models.vae, pixels.to(parameter.dtype))
        if broken := _broken(names, latents):
            yield f"the VAE's answer to {broken} is not finite: use --no_half_vae, or another --vae"
    for key, value in batch.text.items():
        if value.is_floating_point() and (broken := _broken(names, value)):
            yield f"the cached text ({key}) of {broken} is not finite: delete its cache"


def _of_settings(settings: Settings) -> Iterator[str]:
    """Settings that are known to lead there."""
    precision = settings[PrecisionFlags]
    if settings[NoiseFlags].zero_terminal_snr and not settings[ModelFlags].v_parameterization:
        yield "--zero_terminal_snr needs a model with --v_parameterization: the last timestep has no image left"
    if precision.mixed_precision == "fp16":
        yield "fp16 ends at 65504, which models exceed: use --mixed_precision=bf16, or --no_half_vae with fp16"


def _broken(names: Sequence[str], rows: Tensor) -> str:
    """The names of the rows that hold something that is not finite."""
    finite = rows.reshape(len(rows), -1).isfinite().all(dim=1).tolist()
    return ", ".join(name for name, good in zip(names, finite, strict=True) if not good)
