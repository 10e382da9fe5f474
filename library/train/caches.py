"""How the caches of a run are filled, by the training itself or by a tool before it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator

from library.data.cache_arrays import CACHE_DTYPES
from library.data.caching import cache_latents, refuse_changing_pictures
from library.data.dataset import TrainingSet
from library.data.text_caching import cache_text, refuse_changing_captions
from library.flags.dataset import CacheFlags, TextCacheFlags
from library.flags.run import PrecisionFlags, StepFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.accelerator import make_accelerator, wait_patiently, weight_dtype
from library.train.encoders_on_demand import EncodersOnDemand
from library.train.ending import exit_code_of
from library.train.exit_codes import ExitCode, marked
from library.train.images import images_of_run
from library.train.memory import MemoryRoom
from library.train.vae_on_demand import VaeOnDemand

logger = logging.getLogger(__name__)

TEXT_BATCH = 16
"""Captions per call of the text encoders, unless --text_encoder_batch_size says otherwise."""


Fill = Callable[[Settings, Architecture, TrainingSet, Accelerator], None]


def run_cache_tool(settings: Settings, architecture: type[Architecture], fill: Fill) -> int:
    """Find the images that a training with these settings would find, `fill` their caches and return the exit code.

    A mistake of the user's is said without a stack trace.
    """

    def run() -> None:
        accelerator = make_accelerator(settings)
        arch = architecture(settings)
        with marked(ExitCode.DATA):
            data = images_of_run(settings, arch, seed=settings[StepFlags].seed or 0)
        fill(settings, arch, data, accelerator)
        accelerator.end_training()

    return exit_code_of(run, settings)


def fill_all_latents(settings: Settings, arch: Architecture, data: TrainingSet, accelerator: Accelerator) -> None:
    """Encode the images that no valid cache holds, with a VAE that is loaded if there are any."""
    fill_latent_cache(settings, arch, data, vae_of_run(settings, arch, accelerator.device), accelerator)


def refuse_what_changes(settings: Settings, data: TrainingSet) -> None:
    """Raise ValueError when what is to be cached would change from step to step: known before anything is encoded."""
    if settings[CacheFlags].cache_latents:
        refuse_changing_pictures(data)
    text = settings.get(TextCacheFlags)
    if text.cache_text_encoder_outputs:
        refuse_changing_captions(data, text.text_cache_variants)


def vae_of_run(settings: Settings, arch: Architecture, device: torch.device) -> VaeOnDemand:
    """The VAE in the numbers that the settings ask for, not loaded yet."""
    precision = settings[PrecisionFlags]
    return VaeOnDemand(arch, torch.float32 if precision.no_half_vae else weight_dtype(precision), device)


def fill_latent_cache(
    settings: Settings, arch: Architecture, data: TrainingSet, vae: VaeOnDemand, accelerator: Accelerator
) -> None:
    """Encode what no valid cache holds; a run whose caches are complete never loads the VAE for it."""
    flags, vae_id = settings[CacheFlags], arch.vae_id()
    with marked(ExitCode.DATA):
        cache_latents(
            data,
            vae.encode,
            arch.latents,
            vae_id=vae_id,
            batch_size=flags.vae_batch_size,
            to_disk=flags.cache_latents_to_disk,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            skip_cache_check=flags.skip_cache_check,
            dtype=cache_dtype(flags),
        )
    wait_patiently("latent caches")


def fill_all_text(settings: Settings, arch: Architecture, data: TrainingSet, accelerator: Accelerator) -> None:
    """Encode the captions that no valid cache holds, with text encoders that are loaded if there are any."""
    room = MemoryRoom(settings, arch, weight_dtype(settings[PrecisionFlags]), accelerator.device)
    fill_text_cache(settings, arch, data, accelerator, EncodersOnDemand(arch, room))


def fill_text_cache(
    settings: Settings, arch: Architecture, data: TrainingSet, accelerator: Accelerator, encoders: EncodersOnDemand
) -> None:
    """Encode what no valid cache holds; ValueError for a family that has no cache of text."""
    flags, text = settings[CacheFlags], settings[TextCacheFlags]
    encoder_id = arch.text_encoder_id()
    with marked(ExitCode.DATA):
        cache_text(
            data,
            encoders.encode,
            arch.text,
            encoder_id=encoder_id,
            batch_size=text.text_encoder_batch_size or TEXT_BATCH,
            to_disk=text.cache_text_encoder_outputs_to_disk,
            variants=text.text_cache_variants,
            dtype=cache_dtype(flags),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            skip_cache_check=flags.skip_cache_check,
        )
    wait_patiently("text caches")


def cache_dtype(flags: CacheFlags) -> torch.dtype | None:
    """What --cache_dtype names, if it is given."""
    return None if flags.cache_dtype is None else CACHE_DTYPES[flags.cache_dtype]
