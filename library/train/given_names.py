"""Files, classes and modules that the settings name, looked for before hours are spent on caches and models."""

from __future__ import annotations

import importlib
from typing import Any

from library.files.weights import open_weights
from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.settings import Settings
from library.train.exit_codes import ExitCode, marked
from library.train.optimizer import choose_optimizer
from library.train.scheduler import custom_class

WEIGHTS = ("base_weights", "network_weights")
"""Flags that name files of trained weights."""


def check_given_names(settings: Settings) -> None:
    """ValueError, which names the flag, for what is not there, not whole, or of the wrong kind."""
    choose_optimizer(settings[OptimizerFlags])
    custom_class(settings[SchedulerFlags])
    with marked(ExitCode.FAILED):
        if settings.takes(NetworkFlags) and settings[NetworkFlags].network_module is not None:
            network_module(settings[NetworkFlags])
        values = settings.values()
        for flag in WEIGHTS:
            given = values.get(flag) or ()
            for file in (given,) if isinstance(given, str) else given:
                try:
                    open_weights(file).close()
                except ValueError as error:
                    raise ValueError(f"--{flag}: {error}") from error


def network_module(flags: NetworkFlags) -> Any:
    """The module that `--network_module` names."""
    assert flags.network_module is not None  # the settings have been checked
    try:
        return importlib.import_module(flags.network_module)
    except ModuleNotFoundError as error:
        package = flags.network_module.split(".")[0]
        hint = (
            "pip install lycoris-lora" if package == "lycoris" else "is the name right? networks.lora is the usual one"
        )
        raise ValueError(f"--network_module {flags.network_module}: {error}; {hint}") from error
