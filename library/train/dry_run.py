"""What a dry run finds out: whether every file fits, where results would go, and whether memory is enough."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch

from library.flags.output import OutputFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.memory_estimate import Estimate, cures, device_memory
from library.train.run_sheet import gigabytes
from library.train.state import Models

logger = logging.getLogger(__name__)

META = torch.device("meta")


def models_without_weights(arch: Architecture, dtype: torch.dtype) -> Models:
    """The models by the headers of their files; ValueError for whatever these tell is wrong."""
    encoders = arch.load_text_encoders(dtype, META)
    denoiser = arch.load_denoiser(dtype, META)
    vae = arch.load_vae(dtype, META)
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


def report_memory(estimate: Estimate, settings: Settings, device: torch.device) -> None:
    """Log what the run will hold on `device`, and what to change if it does not fit."""
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
