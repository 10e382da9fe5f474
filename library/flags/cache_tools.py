"""What may be said to the tools that fill caches before a training: all that the training is told, and little more."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.flags.dataset import CacheFlags, CaptionFlags, DatasetFlags, TextCacheFlags
from library.flags.declare import declared_flags, flag
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE

SDXL = "caches for SDXL"
FLUX = "caches for FLUX"


@dataclass(frozen=True)
class FamilyFlags:
    """Other model families"""

    sdxl: bool = flag(False, "the model is SDXL", unavailable=SDXL)
    flux: bool = flag(False, "the model is FLUX.1", unavailable=FLUX)
    model_type: str = flag("flux", "layout of the model", choices=("flux", "chroma"), unavailable=FLUX)
    ae: str | None = flag(None, "the autoencoder", unavailable=FLUX)
    clip_l: str | None = flag(None, "the first text encoder", unavailable=FLUX)
    t5xxl: str | None = flag(None, "the second text encoder", unavailable=FLUX)
    t5xxl_max_token_length: int | None = flag(None, "caption length in tokens", unavailable=FLUX)
    apply_t5_attn_mask: bool = flag(False, "mask the padding of the second text encoder", unavailable=FLUX)


@dataclass(frozen=True)
class OnlyTrainingFlags:
    """Training of other model families"""

    controlnet_model_name_or_path: str | None = flag(None, "a ControlNet")
    blocks_to_swap: int | None = flag(None, "blocks kept in main memory")
    guidance_scale: float = flag(3.5, "guidance that the model is told")
    timestep_sampling: str = flag(
        "sigma", "how timesteps are drawn", choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift")
    )
    sigmoid_scale: float = flag(1.0, "spread of timesteps drawn by a sigmoid")
    model_prediction_type: str = flag(
        "sigma_scaled", "what the model's answer is taken for", choices=("raw", "additive", "sigma_scaled")
    )
    discrete_flow_shift: float = flag(3.0, "shift of the noise schedule")
    weighting_scheme: str = flag(
        "uniform",
        "weights of timesteps",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = flag(0.0, "middle of the logit-normal weights")
    logit_std: float = flag(1.0, "spread of the logit-normal weights")
    mode_scale: float = flag(1.29, "scale of the mode weights")


@dataclass(frozen=True)
class CacheToolFlags:
    """Flags of older versions"""

    skip_existing: bool = flag(False, no_effect="caches that are up to date are never made again")


@dataclass(frozen=True)
class CastFlags:
    """Number formats of other model families"""

    t5xxl_dtype: str | None = flag(None, no_effect="text encoders run in --mixed_precision")


@dataclass(frozen=True)
class CacheTool:
    """What one of the tools is told. It takes every flag of the training, so that both may share a settings file."""

    groups: tuple[type, ...]
    read: Collection[str]
    """The flags that decide what is cached."""
    why: str
    """Why the others have no effect."""
    defaults: Mapping[str, Any]

    def settings(self, description: str, argv: Sequence[str] | None = None) -> Settings:
        """The settings of the command line, as `read_settings`."""
        flags = declared_flags(self.groups)
        idle = {name: self.why for name, f in flags.items() if name not in self.read and not f.metadata["no_effect"]}
        return read_settings(self.groups, description, self.defaults, argv, idle)


LOADING = {"train_batch_size", "max_data_loader_n_workers", "persistent_data_loader_workers", "debug_dataset"}
IMAGES = declared_flags([DatasetFlags]).keys() - LOADING
BOTH_READ = IMAGES | {
    *("pretrained_model_name_or_path", "v2", "mixed_precision", "skip_cache_check", "cache_dtype", "ddp_timeout"),
    *("console_log_level", "console_log_file", "console_log_simple"),
    *("config_file", "output_config", "caption_extension", "caption_extention", "masked_loss"),
    *("validation_split", "validation_seed", "seed", "sdxl", "flux", "model_type"),
}
ENCODERS = {"tokenizer_cache_dir", "max_token_length", "clip_skip", "clip_l", "t5xxl", "t5xxl_max_token_length"}
GROUPS = (*TRAIN_NETWORK, *WITH_TEXT_CACHE, FamilyFlags, OnlyTrainingFlags, CacheToolFlags)

CACHE_LATENTS = CacheTool(
    GROUPS,
    read=BOTH_READ | declared_flags([CacheFlags]).keys() | {"vae", "no_half_vae", "ae"},
    why="cached latents do not depend on this",
    defaults={"cache_latents": True, "cache_latents_to_disk": True},
)
CACHE_TEXT = CacheTool(
    (*GROUPS, CastFlags),
    read=BOTH_READ | declared_flags([CaptionFlags, TextCacheFlags]).keys() | ENCODERS | {"apply_t5_attn_mask"},
    why="cached text does not depend on this",
    defaults={"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
)
