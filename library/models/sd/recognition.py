"""Whether a file is a Stable Diffusion 1.x or 2.x model, and if not, what it is and which script takes it."""

from __future__ import annotations

import logging
from pathlib import Path

from library.files.weights import WeightFile, describe_keys
from library.models.kinds import PARTS, kind_of, without

logger = logging.getLogger(__name__)

UNET_FIRST_KEYS = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")
"""The first weight of a U-Net: in a single file, in a folder of diffusers."""

_WHOLE_MODEL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
_TRAINING_ONLY = ("model_ema.", "loss.")
_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)


def check_is_stable_diffusion(file: WeightFile, path: Path) -> None:
    """Look at the keys of the U-Net's file of the model at `path`.

    Raises:
        ValueError: it is of another family, a part alone, no model, or a version with more inputs (inpainting).
    """
    keys = file.keys()
    first = next((key for key in UNET_FIRST_KEYS if key in keys), None)
    other = kind_of(keys, [*without(["sd"]), *(() if first else PARTS)])
    if other is not None:
        raise ValueError(f"{path} is {other.name}, not Stable Diffusion 1.x or 2.x: {other.cure}")
    if first is None:
        raise ValueError(f"{path} is no Stable Diffusion model; it holds {describe_keys(keys, 3)}")
    if first == UNET_FIRST_KEYS[1] and not path.is_dir():
        raise ValueError(f"{path} is the U-Net of a diffusers folder: give the folder that has model_index.json")
    channels = file.shape(first)[1]
    if channels != 4:
        kind = {9: "an inpainting model", 5: "a depth model", 8: "an instruction model"}.get(channels, "not that")
        raise ValueError(
            f"{path} takes {channels} input channels where Stable Diffusion takes 4: it is {kind}, which cannot be "
            "trained here; train on the model that it was made from"
        )


def warn_of_strangers(file: WeightFile) -> None:
    """Name the weights of a single-file model that belong to no part of it.

    Published merges carry leftovers of the tools that made them, which change nothing; a misnamed weight is missing
    where it belongs, and that is an error.
    """
    strangers = [
        key for key in file.keys() if not key.startswith((*_WHOLE_MODEL, *_TRAINING_ONLY)) and key not in _SCHEDULE
    ]
    if strangers:
        logger.warning(
            "%s: %d weights belong to no part of Stable Diffusion and are not used: %s",
            file.path,
            len(strangers),
            describe_keys(strangers),
        )
