"""What may be said to the tools that fill caches before a training: all that the training is told, and little more."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.flags.dataset import CacheFlags, CaptionFlags, DatasetFlags, TextCacheFlags
from library.flags.declare import declared_flags, flag
from library.flags.rules.rule import Rules
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE


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
    rules: Rules = Rules()

    def settings(self, description: str, argv: Sequence[str] | None = None) -> Settings:
        """The settings of the command line, as `read_settings`."""
        flags = declared_flags(self.groups)
        idle = {name: self.why for name, f in flags.items() if name not in self.read and not f.metadata["no_effect"]}
        return read_settings(self.groups, description, self.defaults, argv, idle, self.rules)


_LOADING = {"train_batch_size", "max_data_loader_n_workers", "persistent_data_loader_workers", "debug_dataset"}
_IMAGES = declared_flags([DatasetFlags]).keys() - _LOADING
BOTH_READ = _IMAGES | {
    *("pretrained_model_name_or_path", "v2", "mixed_precision", "skip_cache_check", "cache_dtype", "ddp_timeout"),
    *("console_log_level", "console_log_file", "console_log_simple"),
    *("config_file", "output_config", "caption_extension", "caption_extention", "masked_loss"),
    *("validation_split", "validation_seed", "seed"),
}
"""The flags of every training that decide which images there are, and how the tools run."""
LATENTS_READ = BOTH_READ | declared_flags([CacheFlags]).keys() | {"vae", "no_half_vae"}
TEXT_READ = (
    BOTH_READ
    | declared_flags([CaptionFlags, TextCacheFlags]).keys()
    | {"tokenizer_cache_dir", "max_token_length", "clip_skip"}
)
TRAINING: tuple[type, ...] = (*TRAIN_NETWORK, *WITH_TEXT_CACHE, CacheToolFlags)
"""The flags that the tools share with the training of every family."""
