"""The models that a run starts from, read in an order in which little of them is in memory at a time."""

from __future__ import annotations

from accelerate import Accelerator

from library.data.dataset import TrainingSet
from library.flags.dataset import CacheFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.caches import fill_latent_cache, vae_of_run
from library.train.memory import MemoryRoom
from library.train.state import Models


def frozen_models(
    settings: Settings,
    arch: Architecture,
    data: TrainingSet,
    accelerator: Accelerator,
    room: MemoryRoom,
    *,
    keep_vae: bool,
) -> Models:
    """Fill the caches of `data`, then read text encoders and denoiser into the places that `room` has for them.

    The VAE is there while latents are not cached; otherwise `keep_vae` keeps it in main memory, for previews, which
    bring it to the device for each picture.
    """
    device = accelerator.device
    vae = vae_of_run(settings, arch, device)
    if settings[CacheFlags].cache_latents:
        fill_latent_cache(settings, arch, data, vae, accelerator)
    encoders = room.load_text_encoders()
    models = Models(encoders, room.load_denoiser())
    if not data.latents_cached:
        models.vae = vae.get()
    elif keep_vae:
        models.vae = vae.get().to("cpu")
    return models
