"""TensorBoard and wandb: which of them a run logs to, where, and what they are told at the start."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import toml
from accelerate import Accelerator

from library.flags.output import LoggingFlags
from library.flags.settings import Settings

TRACKERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "all": ("tensorboard", "wandb"),
}
"""--log_with -> trackers; each is also the name of the package it needs."""

SECRETS = frozenset(["wandb_api_key", "huggingface_token"])
"""Flags whose values are shown nowhere."""


def wanted_trackers(flags: LoggingFlags) -> tuple[str, ...]:
    """The trackers that --log_with and --logging_dir ask for; TensorBoard when only a folder is given."""
    name = flags.log_with or ("tensorboard" if flags.logging_dir else None)
    if name is None:
        return ()
    trackers = TRACKERS[name]
    if "tensorboard" in trackers and not flags.logging_dir:
        raise ValueError(f"--log_with={name} needs --logging_dir, the folder for its files")
    for package in trackers:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--log_with={name} needs the package {package}: pip install {package}")
    return trackers


def run_directory(flags: LoggingFlags) -> Path:
    """`logging_dir/<log_prefix><YYYYmmddHHMMSS>`, a folder for this run alone."""
    assert flags.logging_dir is not None
    return Path(flags.logging_dir) / f"{flags.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


def start_trackers(accelerator: Accelerator, settings: Settings, default_name: str = "network_train") -> None:
    """Open the trackers on the main process, with the settings in them if --log_config asks for that."""
    flags = settings[LoggingFlags]
    trackers = wanted_trackers(flags)
    if not trackers or not accelerator.is_main_process:
        return
    wandb = {"name": flags.wandb_run_name, "dir": accelerator.logging_dir}
    options: dict[str, Any] = {"wandb": {key: value for key, value in wandb.items() if value is not None}}
    if flags.log_tracker_config:
        options = read_tracker_config(flags.log_tracker_config)
    if "wandb" in trackers and flags.wandb_api_key:
        importlib.import_module("wandb").login(key=flags.wandb_api_key)
    accelerator.init_trackers(
        flags.log_tracker_name or default_name,
        config=shown_settings(settings.values()) if flags.log_config else None,
        init_kwargs=options,
    )


def read_tracker_config(path: str) -> dict[str, Any]:
    """The tables of a TOML file, one per tracker."""
    try:
        return toml.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--log_tracker_config {path} cannot be read: {error}") from error
    except toml.TomlDecodeError as error:
        raise ValueError(f"--log_tracker_config {path} is not valid TOML: {error}") from error


def shown_settings(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """`values` that may be shown to others, as trackers take them: no keys, no absolute paths."""
    shown: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if name in SECRETS or _holds_absolute_path(value):
            continue
        shown[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return shown


def _holds_absolute_path(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_absolute_path(part) for part in value)
    if not isinstance(value, (str, Path)):
        return False
    text = str(value)
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
