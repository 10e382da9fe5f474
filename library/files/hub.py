"""Fetching models from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/model and is no path that exists."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def download(hub_id: str, choose: Callable[[list[str]], Iterable[str]], flag: str) -> Path:
    """Fetch the files of `hub_id` that `choose` picks from its list of files, and return their folder.

    Without a network, what an earlier run fetched is used.

    Raises:
        ValueError: there is no such model, no way to reach it, or no permission; names the id and `flag`.
    """
    try:
        files = list(choose(HfApi().list_repo_files(hub_id)))
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # the hub's client does not wrap what its HTTP library raises, which changes by release
        earlier = _fetched_earlier(hub_id)
        if earlier is not None:
            return earlier
        raise ValueError(
            f"{flag}: {hub_id!r} is no file or folder here, and the model hub did not give a model of that name "
            f"({type(error).__name__}). Check the spelling and the network, or give the path of a local file or folder"
        ) from error


def _fetched_earlier(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        return None
