"""What a dry run finds out: whether every file fits, where results would go, and whether memory is enough."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch

from library.data.dataset import TrainingSet
from library.flags.dataset import TextCacheFlags
from library.flags.output import OutputFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.encoders_on_demand import EncodersOnDemand
from library.train.frozen_models import encoders_beside_cache
from library.train.memory import MemoryRoom
from library.train.memory_estimate import cures, device_memory, estimate_memory
from library.train.run_sheet import gigabytes
from library.train.state import Models, ParameterGroups, Trained

logger = logging.getLogger(__name__)

META = torch.device("meta")


def models_without_weights(
    settings: Settings, arch: Architecture, room: MemoryRoom, *, trains_text_encoder: bool
) -> Models:
    """The models by the headers of their files; ValueError for whatever these tell is wrong."""
    encoders = room.load_text_encoders()
    if settings.get(TextCacheFlags).cache_text_encoder_outputs:
        encoders = encoders_beside_cache(arch, EncodersOnDemand(arch, room), trains_text_encoder)
    denoiser = room.load_denoiser()
    vae = arch.load_vae(room.dtype, META)
    arch.tokenize(["a"])
    return Models(encoders, denoiser, vae)


def check_output_folder(flags: OutputFlags) -> None:
    """Raise ValueError unless files can be written to --output_dir, which need not be there yet."""
    if flags.output_dir is None:
        raise ValueError("--output_dir is needed: the folder that results are saved to")
    folder = Path(flags.output_dir).absolute()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--output_dir {folder}: {there} is a file, so no folder can be made there")
    try:
        if there == folder:
            handle, name = tempfile.mkstemp(prefix=".dry-run-", dir=folder)
            os.close(handle)
            os.unlink(name)
        elif not os.access(there, os.W_OK):
            raise PermissionError(f"{there} cannot be written to")
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error}") from error


def report_memory(
    settings: Settings,
    arch: Architecture,
    room: MemoryRoom,
    models: Models,
    trained: Trained,
    groups: ParameterGroups,
    data: TrainingSet,
    device: torch.device,
) -> None:
    """Log what the run will hold on `device`, and what to change if it does not fit."""
    estimate = estimate_memory(settings, arch, room, models, trained, groups, data, on_gpu=device.type == "cuda")
    logger.info("%s", estimate.table().text())
    there, what = device_memory(device)
    if estimate.total <= there:
        logger.info("about %s are needed, %s are %s", gigabytes(estimate.total), gigabytes(there), what)
        return
    advice = "\n".join(f"  {text}" for text in cures(settings))
    logger.warning(
        "about %s are needed, but %s are %s. What to change, what costs least first:\n%s",
        gigabytes(estimate.total),
        gigabytes(there),
        what,
        advice,
    )
