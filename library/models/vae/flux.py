"""The autoencoder of FLUX.1, Chroma and Lumina Image 2: 16 channels, shift and scale inside."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from library.files.formats import LatentFormat
from library.files.shards import open_model
from library.files.sources import Source
from library.files.views import part_of
from library.files.weights import WeightFile
from library.models.kinds import MODELS, kind_of
from library.models.parts import part_folder
from library.models.vae.sd import build_vae, encoder_id, sources_with

CHANNELS, STRIDE = 16, 8
PREFIX = "vae."
"""Where it lies in a file that holds the whole model."""
SCALE, SHIFT = 0.3611, 0.1159
"""Bring the latents to unit variance around zero."""


def load_ae(path: Path, flag: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The autoencoder at `path`, what `flag` names, frozen: a file of either layout or a folder of diffusers.

    Raises:
        ValueError: it is something else, or not whole.
    """
    with open_model(part_folder(path, "vae")) as file:
        return build_vae(_checked_sources(part_of(file, PREFIX), path, flag), dtype, device)


def ae_id(path: Path, flag: str) -> str:
    """What names the encoder half of the autoencoder at `path`."""
    with open_model(part_folder(path, "vae")) as file:
        return encoder_id(_checked_sources(part_of(file, PREFIX), path, flag))


def latent_format(suffix: str) -> LatentFormat:
    """Of a family with this autoencoder; `suffix` ends the names of its cache files."""
    return LatentFormat(channels=CHANNELS, stride=STRIDE, suffix=suffix, sizes_in_keys=True)


def encode(vae: nn.Module, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 16, H/8, W/8], drawn from the posterior, shifted and scaled."""
    posterior = cast(AutoencoderKL, vae).encode(pixels.to(next(vae.parameters()))).latent_dist
    latents: Tensor = (posterior.sample(generator) - SHIFT) * SCALE
    return latents


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """[B, 16, h, w] shifted and scaled -> [B, 3, 8h, 8w] in [-1, 1]."""
    latents = latents.to(next(vae.parameters())) / SCALE + SHIFT
    pixels: Tensor = cast(AutoencoderKL, vae).decode(latents).sample
    return pixels


def _checked_sources(file: WeightFile, path: Path, flag: str) -> dict[str, Source]:
    keys = file.keys()
    kind = kind_of(keys, MODELS)
    if kind is not None:
        raise ValueError(f"{flag}: {path} is {kind.name}, not the FLUX.1 autoencoder (ae.safetensors)")
    return sources_with(CHANNELS, file, path, flag, "FLUX.1")
