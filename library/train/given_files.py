"""Files of trained weights that the settings name, opened before hours are spent on caches and models."""

from __future__ import annotations

from library.files.weights import open_weights
from library.flags.settings import Settings

FLAGS = ("base_weights", "network_weights")


def check_given_files(settings: Settings) -> None:
    """Raise ValueError, which names flag and file, for one that is not whole or no file of weights."""
    values = settings.values()
    for flag in FLAGS:
        given = values.get(flag) or ()
        for file in (given,) if isinstance(given, str) else given:
            try:
                open_weights(file).close()
            except ValueError as error:
                raise ValueError(f"--{flag}: {error}") from error
