"""What a trained file says about its training: the ss_* and modelspec.* entries."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from library.files.hashing import BackgroundHash
from library.files.model_spec import build_model_spec, commit_hash
from library.flags.dataset import CacheFlags, CaptionFlags, DatasetFlags
from library.flags.model import ModelFlags
from library.flags.monitor import ValidationFlags
from library.flags.network import NetworkFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import MetadataFlags, OutputFlags
from library.flags.run import MemoryFlags, PrecisionFlags, StepFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.optimizer import choose_optimizer, optimizer_description
from library.train.scheduler import schedule_flags
from library.train.state import Plan

MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What --no_metadata leaves: without these a file cannot be told from one of another model or merged."""

JSON_KEYS = frozenset(
    [
        "ss_datasets",
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_reg_dataset_dirs",
        "ss_bucket_info",
        "ss_network_args",
    ]
)
"""Entries that hold JSON text; every other is Python's `str` of the value, so None is `None`."""

FROM_FLAGS: Mapping[type, tuple[str, ...]] = {
    OutputFlags: ("output_name", "training_comment"),
    MemoryFlags: ("gradient_checkpointing", "lowram"),
    StepFlags: ("gradient_accumulation_steps",),
    SchedulerFlags: ("lr_warmup_steps",),
    NetworkFlags: ("network_module", "network_dim", "network_alpha", "network_dropout", "scale_weight_norms"),
    PrecisionFlags: ("mixed_precision", "full_fp16", "fp8_base", "fp8_base_unet"),
    ModelFlags: ("clip_skip", "max_token_length"),
    CacheFlags: ("cache_latents",),
    NoiseFlags: (
        "noise_offset",
        "multires_noise_iterations",
        "multires_noise_discount",
        "adaptive_noise_scale",
        "zero_terminal_snr",
        "ip_noise_gamma",
        "noise_offset_random_strength",
        "ip_noise_gamma_random_strength",
    ),
    OptimizerFlags: ("max_grad_norm",),
    CaptionFlags: ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
    DatasetFlags: ("face_crop_aug_range", "resize_interpolation"),
    LossFlags: ("prior_loss_weight", "min_snr_gamma", "loss_type", "huber_schedule", "huber_scale", "huber_c"),
    ValidationFlags: (
        "validation_seed",
        "validation_split",
        "max_validation_steps",
        "validate_every_n_epochs",
        "validate_every_n_steps",
    ),
}
"""Flags that are entries under their own names."""

FROM_FLAGS_WITHOUT_CONFIG: Mapping[type, tuple[str, ...]] = {
    DatasetFlags: ("color_aug", "flip_aug", "random_crop"),
    CaptionFlags: ("shuffle_caption", "keep_tokens"),
}
"""The same, for a dataset that is described by flags alone."""

ONLY_WITHOUT_CONFIG = frozenset(
    [
        "ss_reg_dataset_dirs",
        "ss_batch_size_per_device",
        "ss_total_batch_size",
        "ss_resolution",
        "ss_color_aug",
        "ss_flip_aug",
        "ss_random_crop",
        "ss_shuffle_caption",
        "ss_enable_bucket",
        "ss_bucket_no_upscale",
        "ss_min_bucket_reso",
        "ss_max_bucket_reso",
        "ss_keep_tokens",
        "ss_bucket_info",
    ]
)
"""Entries of a single dataset; with --dataset_config `ss_datasets` says it for each."""


@dataclass(frozen=True)
class RunFacts:
    """What a run knows that no flag says."""

    seed: int
    num_batches_per_epoch: int
    """Of one rank."""
    num_epochs: int
    max_train_steps: int
    num_processes: int = 1
    session_id: int = field(default_factory=lambda: random.SystemRandom().randrange(2**32))
    started_at: float = field(default_factory=time.time)
    """Unix time."""

    @staticmethod
    def of(plan: Plan, num_processes: int, seed: int) -> RunFacts:
        """Those of a run that begins now."""
        return RunFacts(seed, plan.batches_per_epoch, plan.epochs, plan.steps, num_processes)


def training_metadata(
    settings: Settings, arch: Architecture, dataset_entries: Mapping[str, Any], run_facts: RunFacts
) -> dict[str, str]:
    """The ss_* entries that are the same for every file of a run.

    `dataset_entries` are those about the data, by their full names, as Python values or as text; `arch.metadata()`
    adds its own and wins. Steps, epoch and hashes come with `file_metadata`.
    """
    flags = _own_names(settings, FROM_FLAGS)
    entries: dict[str, Any] = flags | _rates(settings) | _run_entries(settings, run_facts)
    version = arch.base_model_version()
    entries["ss_base_model_version"] = version
    entries["ss_v2"] = settings[ModelFlags].v2 or version.startswith("sd_v2")
    entries |= _network_args(settings[NetworkFlags])
    entries |= _names(settings[ModelFlags])
    entries |= _dataset(settings, dataset_entries, run_facts)
    entries |= arch.metadata()
    return {key: as_text(key, value) for key, value in entries.items()}


def file_metadata(
    settings: Settings,
    arch: Architecture,
    metadata: Mapping[str, str],
    hashes: Mapping[str, BackgroundHash],
    *,
    step: int,
    epoch: int,
    resolution: tuple[int, int] | None = None,
    time: datetime | None = None,
) -> dict[str, str]:
    """All entries of one file: `metadata` of the run, with what is known at its save, and modelspec.*.

    `epoch` is the finished epoch for an epoch's file, the number of epochs for the last file, and the running
    epoch counted from 0 for a step's file. Waits for `hashes`, so it is best called where nobody waits. Under
    --no_metadata only `MINIMUM` and modelspec.* stay.
    """
    now = time or datetime.now()
    spec = model_spec(settings, arch.model_spec(), resolution, now)
    if settings[OutputFlags].no_metadata:
        return minimum_metadata(metadata) | spec
    return at_save(metadata, step, epoch, hashes, now.timestamp()) | spec


def at_save(
    metadata: Mapping[str, str],
    step: int,
    epoch: int,
    hashes: Mapping[str, BackgroundHash],
    finished_at: float,
) -> dict[str, str]:
    """`metadata` with the hashes of the models and how far the run has come; `finished_at` is Unix time."""
    entries = dict(metadata)
    for name, background in hashes.items():
        found = background.result()
        entries |= {f"ss_{name}_hash": found.legacy, f"ss_new_{name}_hash": found.sha256}
    now = {"ss_training_finished_at": finished_at, "ss_steps": step, "ss_epoch": epoch}
    return entries | {key: str(value) for key, value in now.items()}


def minimum_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of `metadata` that --no_metadata leaves."""
    return {key: metadata[key] for key in MINIMUM if key in metadata}


def start_hashing(flags: ModelFlags) -> dict[str, BackgroundHash]:
    """Begin to hash the base model and the VAE, in threads, where they are on this machine's disk."""
    paths = {"sd_model": flags.pretrained_model_name_or_path, "vae": flags.vae}
    return {name: BackgroundHash(path) for name, path in paths.items() if path is not None and Path(path).exists()}


def model_spec(
    settings: Settings,
    arch_spec: Mapping[str, str],
    resolution: tuple[int, int] | None,
    now: datetime,
    adapter: str | None = "lora",
) -> dict[str, str]:
    """The modelspec.* entries of a network, or of a whole model if `adapter` is None.

    `arch_spec` is `Architecture.model_spec()`; `resolution` is what the data was trained at.
    """
    described = settings[MetadataFlags]
    noise = settings[NoiseFlags]
    return build_model_spec(
        arch_spec,
        {entry.name.removeprefix("metadata_"): getattr(described, entry.name) for entry in fields(described)},
        title=settings[OutputFlags].output_name,
        resolution=resolution or settings[DatasetFlags].resolution,
        timestep_range=(noise.min_timestep, noise.max_timestep),
        clip_skip=settings[ModelFlags].clip_skip,
        time=now,
        adapter=adapter,
        commit=commit_hash(),
    )


def dataset_resolution(dataset_entries: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the largest dataset that the entries speak of."""
    described = dataset_entries.get("ss_datasets") or []
    described = json.loads(described) if isinstance(described, str) else described
    sizes = [dataset["resolution"] for dataset in described if dataset.get("resolution")]
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return int(width), int(height)


def as_text(key: str, value: Any) -> str:
    """`value` as metadata holds it."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if key in JSON_KEYS else str(value)


def _own_names(settings: Settings, table: Mapping[type, tuple[str, ...]]) -> dict[str, Any]:
    return {f"ss_{name}": getattr(settings[group], name) for group, names in table.items() for name in names}


def _rates(settings: Settings) -> dict[str, Any]:
    """Optimizer, schedule and learning rates, as they hold once the optimizer has had its word."""
    flags = settings[OptimizerFlags]
    choice = choose_optimizer(flags)
    own = choice.sets_its_own_rate
    text_rates = flags.text_encoder_lr
    # One rate is written as a number: that is how it is written for networks that take one only.
    text_rate = text_rates[0] if text_rates and len(text_rates) == 1 else text_rates and list(text_rates)
    return {
        "ss_optimizer": optimizer_description(choice),
        "ss_lr_scheduler": schedule_flags(settings[SchedulerFlags], choice, flags.learning_rate).lr_scheduler,
        "ss_learning_rate": None if own else flags.learning_rate,
        "ss_unet_lr": None if own else flags.unet_lr,
        "ss_text_encoder_lr": None if own else text_rate,
    }


def _run_entries(settings: Settings, facts: RunFacts) -> dict[str, Any]:
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_seed": facts.seed,
        "ss_debiased_estimation": settings[LossFlags].debiased_estimation_loss,
        "ss_sd_scripts_commit_hash": commit_hash() or "(unknown)",
    }


def _network_args(flags: NetworkFlags) -> dict[str, Any]:
    if not flags.network_args:
        return {}
    arguments: dict[str, Any] = dict(pair.split("=", 1) for pair in flags.network_args)
    if not flags.dim_from_weights:
        arguments.setdefault("dropout", flags.network_dropout)
    return {"ss_network_args": arguments}


def _names(flags: ModelFlags) -> dict[str, Any]:
    """Names of the models, without the folders that they lie in; a hub id stays whole."""
    paths = {"ss_sd_model_name": flags.pretrained_model_name_or_path, "ss_vae_name": flags.vae}
    return {key: Path(path).name if Path(path).exists() else path for key, path in paths.items() if path is not None}


def _dataset(settings: Settings, given: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """The entries about the data that belong to how the data was described."""
    flags = settings[DatasetFlags]
    if flags.dataset_config is not None:
        entries = {key: value for key, value in given.items() if key not in ONLY_WITHOUT_CONFIG}
    else:
        accumulated = settings[StepFlags].gradient_accumulation_steps
        entries = _own_names(settings, FROM_FLAGS_WITHOUT_CONFIG)
        entries["ss_batch_size_per_device"] = flags.train_batch_size
        entries["ss_total_batch_size"] = flags.train_batch_size * facts.num_processes * accumulated
        entries |= {key: value for key, value in given.items() if key != "ss_datasets"}
    return {"ss_num_validation_images": 0} | entries
