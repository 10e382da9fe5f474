"""Make pictures with FLUX.1 or Chroma and LoRA."""

import sys

from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings
from library.models.flux.picture_flags import FLUX_PICTURES, PICTURE_RULES, FluxPictureFlags

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(FLUX_PICTURES, description=__doc__, rules=PICTURE_RULES)
    set_up_logging(LoggingFlags(), settings.warnings)

import importlib
import logging
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from library.flags.model import ModelFlags
from library.flags.run import AttentionFlags
from library.flags.settings import Settings
from library.generation.images import free_name, save_png
from library.generation.interactive import HELP, Turn, turns
from library.generation.loras import Loras, LoraWeights
from library.generation.pipeline import Numbers, Pipeline
from library.models.architecture import ImageRequest
from library.models.flux.architecture import Flux
from library.models.flux.flags import FluxModelFlags
from library.models.flux.sampling import GRID
from library.models.flux.variants import SCHNELL
from networks.core.network import read_network_weights

logger = logging.getLogger(__name__)

STEPS, STEPS_OF_SCHNELL = 50, 4
NETWORK_MODULE = "networks.lora_flux"
MEMORY_ADVICE = "the device has too little memory: try --offload, then --t5xxl_dtype=fp8 and --flux_dtype=fp8"


def main(settings: Settings) -> int:
    """Make the picture of --prompt, or one for each line typed; 1 and one message if something does not fit."""
    try:
        make_pictures(settings)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except torch.OutOfMemoryError:
        logger.error(MEMORY_ADVICE)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def make_pictures(settings: Settings) -> None:
    """Read, make, write; ValueError or OSError if a file is missing or does not fit."""
    flags = settings[FluxPictureFlags]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = architecture(settings)
    loras = Loras([lora_file(*pair) for pair in flags.lora_weights], flags.merge_lora_weights)
    pipeline = Pipeline(arch, device, numbers(flags), not flags.interactive, flags.offload, loras)
    folder, first = Path(flags.output_dir), first_request(flags, arch)
    if not flags.interactive:
        make_one(pipeline, loras, Turn(first), folder)
        return
    logger.info("%s", HELP)
    for turn in turns(first, lambda: input("prompt: ")):
        try:
            make_one(pipeline, loras, turn, folder)
        except ValueError as error:
            logger.error("%s", error)


def architecture(settings: Settings) -> Flux:
    """The family with the files that the flags name."""
    flags = settings[FluxPictureFlags]
    model = ModelFlags(pretrained_model_name_or_path=flags.ckpt_path, tokenizer_cache_dir=flags.tokenizer_cache_dir)
    return Flux(Settings.of(model, settings[FluxModelFlags], AttentionFlags(sdpa=True)))


def lora_file(path: str, multiplier: float) -> LoraWeights:
    """A file of --lora_weights with what is in it."""
    return LoraWeights(path, multiplier, read_network_weights(path), importlib.import_module(NETWORK_MODULE))


def numbers(flags: FluxPictureFlags) -> Numbers:
    """The number formats of --dtype and its kin."""

    def dtype(name: str | None) -> torch.dtype:
        return getattr(torch, name or flags.dtype)

    return Numbers(
        (dtype(flags.clip_l_dtype), dtype(flags.t5xxl_dtype)), dtype(flags.flux_dtype), dtype(flags.ae_dtype)
    )


def first_request(flags: FluxPictureFlags, arch: Flux) -> ImageRequest:
    """What the command line asks for; typed prompts start from it."""
    is_schnell = arch.variant is SCHNELL
    extras: dict[str, Any] = {"flow_shift": 1.0} if is_schnell else {}
    if flags.controlnet_image is not None:
        extras["controlnet_image"] = flags.controlnet_image
    return ImageRequest(
        prompt=flags.prompt,
        negative_prompt=flags.negative_prompt or "",
        width=flags.width,
        height=flags.height,
        seed=flags.seed,
        steps=flags.steps or (STEPS_OF_SCHNELL if is_schnell else STEPS),
        scale=flags.cfg_scale,
        guidance_scale=flags.guidance,
        extras=extras,
    )


def make_one(pipeline: Pipeline, loras: Loras, turn: Turn, folder: Path) -> None:
    """Make and write one picture; its sides become multiples of the grid, and its name the time."""
    asked = turn.request
    assert asked.width is not None and asked.height is not None
    request = replace(
        asked,
        width=-(-asked.width // GRID) * GRID,
        height=-(-asked.height // GRID) * GRID,
        seed=random.SystemRandom().getrandbits(32) if asked.seed is None else asked.seed,
        scale=asked.scale if asked.negative_prompt else 1.0,
    )
    if turn.multipliers is not None:
        loras.set_multipliers(turn.multipliers)
    picture = pipeline.make(pipeline.arch.complete_request(request))
    path = free_name(folder / f"{datetime.now():%Y%m%d_%H%M%S}.png")
    save_png(picture, path)
    logger.info("%s: %dx%d, %s steps, seed %s", path, request.width, request.height, request.steps, request.seed)


if __name__ == "__main__":
    sys.exit(main(settings))
