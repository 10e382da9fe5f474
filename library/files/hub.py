"""Fetching from the Hugging Face hub, and uploading to it."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/model and is no path that exists."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def locate(name: str, choose: Callable[[list[str]], Iterable[str]], flag: str, suffixes: Collection[str]) -> Path:
    """The file or folder that `name` means; of a hub id the files that `choose` picks are fetched.

    A name that ends in one of `suffixes` is a file, here or nowhere.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name; names it and `flag`.
    """
    path = Path(name)
    if path.exists():
        return path
    if not is_hub_id(name) or path.suffix.lower() in suffixes:
        raise FileNotFoundError(f"{flag}: {name}: no such file or folder")
    return download(name, choose, flag)


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


def download_folder(place: str, token: str | None = None) -> Path:
    """Fetch every file under `place`, `owner/name/folder[:revision[:kind]]`, and return the local folder.

    Raises:
        ValueError: `place` has another form, nothing lies there, or the hub cannot be reached; names --resume.
    """
    path, _, rest = place.partition(":")
    revision, _, kind = rest.partition(":")
    owner, _, inside = path.partition("/")
    name, _, folder = inside.partition("/")
    if not (owner and name and folder):
        raise ValueError(f"--resume {place}: --resume_from_huggingface expects owner/name/folder[:revision[:kind]]")
    options: dict[str, Any] = {"repo_id": f"{owner}/{name}", "token": token}
    options |= {"revision": revision or None, "repo_type": kind or None}
    folder = folder.strip("/")
    try:
        files = [file for file in _api().list_repo_files(**options) if file.startswith(folder + "/")]
        if not files:
            raise ValueError(f"{owner}/{name} has no folder {folder}")
        target = Path(tempfile.mkdtemp(prefix="resume-"))
        for file in files:
            hf_hub_download(filename=file, local_dir=target, endpoint=_endpoint(), **options)
    except Exception as error:  # as above
        raise ValueError(f"--resume {place} could not be fetched from the hub: {error}") from error
    return target / folder


@dataclass(frozen=True)
class HubPlace:
    """Where uploads go."""

    repository: str
    kind: str = "model"
    folder: str = ""
    token: str | None = None
    public: bool = False


class Uploads:
    """Copies files and folders to the hub, one after the other, at once or in a thread of its own.

    A failure is a warning: a run does not end because a network is down, and the file lies here too.
    """

    def __init__(self, place: HubPlace, in_background: bool = False) -> None:
        self.place = place
        self._made = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads") if in_background else None

    @property
    def in_background(self) -> bool:
        """Whether `send` returns before the upload is done."""
        return self._thread is not None

    def send(self, path: Path) -> None:
        """Upload a file or a folder under its own name."""
        if self._thread is None:
            self._send(path)
        else:
            self._thread.submit(self._send, path)

    def close(self) -> None:
        """Wait until everything is uploaded."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _send(self, path: Path) -> None:
        place, api = self.place, _api()
        inside = "/".join(part for part in (place.folder.strip("/"), path.name) if part)
        options: dict[str, Any] = {"repo_id": place.repository, "repo_type": place.kind, "token": place.token}
        try:
            if not self._made:
                api.create_repo(**options, private=not place.public, exist_ok=True)
                self._made = True
            if path.is_dir():
                api.upload_folder(folder_path=path, path_in_repo=inside, **options)
            else:
                api.upload_file(path_or_fileobj=path, path_in_repo=inside, **options)
            logger.info("uploaded %s to %s/%s", path.name, place.repository, inside)
        except Exception as error:  # as above
            logger.warning("%s could not be uploaded to %s: %s; training goes on", path, place.repository, error)


def _endpoint() -> str | None:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or None


def _api() -> HfApi:
    return HfApi(endpoint=_endpoint())


def _fetched_earlier(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        return None
