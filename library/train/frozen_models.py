"""The models that a run starts from, read in an order in which little of them is in memory at a time."""

from __future__ import annotations

import gc

import torch
from accelerate import Accelerator
from torch import nn

from library.data.dataset import TrainingSet
from library.flags.dataset import CacheFlags, TextCacheFlags
from library.flags.settings import Settings
from library.models.architecture import AbsentEncoder, Architecture
from library.train.caches import fill_latent_cache, fill_text_cache, vae_of_run
from library.train.encoders_on_demand import EncodersOnDemand
from library.train.memory import MemoryRoom
from library.train.preview import Previews
from library.train.state import Models


def frozen_models(
    settings: Settings,
    arch: Architecture,
    data: TrainingSet,
    accelerator: Accelerator,
    room: MemoryRoom,
    previews: Previews,
    *,
    trains_text_encoder: bool,
) -> Models:
    """Fill the caches of `data`, then read text encoders and denoiser into the places that `room` has for them.

    Text encoders whose answers are cached are gone before the denoiser is read. The VAE is there while latents are
    not cached; otherwise it is kept in main memory for previews, which bring it to the device for each picture.
    """
    device = accelerator.device
    vae = vae_of_run(settings, arch, device)
    if settings[CacheFlags].cache_latents:
        fill_latent_cache(settings, arch, data, vae, accelerator)
    if settings.get(TextCacheFlags).cache_text_encoder_outputs:
        on_demand = EncodersOnDemand(arch, room)
        fill_text_cache(settings, arch, data, accelerator, on_demand)
        if previews.wanted:
            previews.encode_ahead(on_demand.get(), accelerator)
        encoders = encoders_beside_cache(arch, on_demand, trains_text_encoder)
        del on_demand
        _free_memory(device)
    else:
        encoders = room.load_text_encoders()
    models = Models(encoders, room.load_denoiser())
    if not data.latents_cached:
        models.vae = vae.get()
    elif previews.wanted:
        models.vae = vae.get().to("cpu")
    return models


def encoders_beside_cache(arch: Architecture, encoders: EncodersOnDemand, trains_text_encoder: bool) -> list[nn.Module]:
    """The text encoders that a run with cached text still needs: those it trains, with stand-ins for the others.

    Raises:
        ValueError: the text encoders are to be trained, and all of their answers are cached.
    """
    if not trains_text_encoder:
        return []
    if not arch.trained_beside_cache:
        raise ValueError(
            "--cache_text_encoder_outputs leaves no text encoder to be trained: "
            "add --network_train_unet_only, or leave it out"
        )
    return [
        encoder if number in arch.trained_beside_cache else AbsentEncoder()
        for number, encoder in enumerate(encoders.get())
    ]


def _free_memory(device: torch.device) -> None:
    """Give back what the caches took, once, so that the denoiser finds it in one piece."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
