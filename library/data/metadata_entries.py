"""How captions, tags and sizes get into a metadata file, one entry for each image."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.data.findings import listed
from library.data.image_file import image_endings
from library.data.metadata_file import read_entries
from library.files.atomic import replacing

logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]
"""What a metadata file holds: key of an image -> `caption`, `tags`, `image_size` and more."""


def merge_texts(
    folder: Path,
    out_json: Path,
    in_json: Path | None,
    *,
    name: str,
    extension: str,
    full_path: bool,
    recursive: bool,
) -> None:
    """Write into the entry `name` of every image in `folder` what stands in the text file beside it.

    Entries of `in_json`, or else of `out_json` if it is there, are kept. Keys are the stems of the images, or with
    `full_path` their paths as found. Nothing is written, and a ValueError lists why, when a text is missing or two
    images would share a key.
    """
    entries = read_metadata(in_json or out_json) if in_json or out_json.is_file() else {}
    keys = image_keys(folder, full_path=full_path, recursive=recursive)
    ending = extension if extension.startswith(".") else f".{extension}"
    mistakes: dict[Path, str] = {}
    for key, image in keys.items():
        try:
            text = _text(image, ending)
        except ValueError as error:
            mistakes[image] = str(error)
            continue
        entries.setdefault(key, {})[name] = text
        logger.debug("%s: %s", key, text)
    if mistakes:
        raise ValueError(f"{len(mistakes)} of {len(keys)} images have no usable text:\n{listed(mistakes)}")
    write_metadata(out_json, entries)
    logger.info("%s: %s of %d images, %d entries in all", out_json, name, len(keys), len(entries))


def image_keys(folder: Path, *, full_path: bool, recursive: bool) -> dict[str, Path]:
    """Key -> path of the images in `folder`, sorted; ValueError if there is none, or two have one key."""
    if recursive and not full_path:
        raise ValueError("--recursive needs --full_path, since names may occur in several folders")
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    endings = image_endings()
    keys: dict[str, Path] = {}
    for path in found:
        if os.path.splitext(path.name)[1] not in endings or not path.is_file():
            continue
        key = str(path) if full_path else path.stem
        if key in keys:
            raise ValueError(f"{keys[key]} and {path.name} have the same key, {key}; use --full_path")
        keys[key] = path
    if not keys:
        raise ValueError(f"{folder}: there are no images in it")
    return keys


def read_metadata(file: Path) -> Entries:
    """The entries of a .json or .jsonl file, as they stand; ValueError names the file and the entry that is none."""
    entries = read_entries(file)
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(f'{file}: key {key!r}: expected {{"caption": "...", "tags": "..."}}, got {entry!r:.60}')
        for name in ("caption", "tags"):
            if not isinstance(entry.get(name), str | None):
                raise ValueError(f"{file}: key {key!r}: {name} is {entry[name]!r:.60}; expected text")
    return entries


def write_metadata(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `entries`, two blanks deep and in ASCII; a .jsonl file gets a line for each."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(f"{file}: expected a file that ends in .json or .jsonl")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}")
    if file.suffix.lower() == ".jsonl":
        text = "".join(json.dumps({"image_path": key, **entry}) + "\n" for key, entry in entries.items())
    else:
        text = json.dumps(entries, indent=2) + "\n"
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clean_entries(entries: Entries, clean_tags: Callable[[str], str], clean_caption: Callable[[str], str]) -> Entries:
    """The entries with clean tags and captions where they have some."""
    cleaned = {}
    for key, entry in entries.items():
        changes = {
            name: clean(entry[name])
            for name, clean in (("tags", clean_tags), ("caption", clean_caption))
            if entry.get(name) is not None
        }
        for name, text in changes.items():
            logger.debug("%s: %s: %s -> %s", key, name, entry[name], text)
        cleaned[key] = {**entry, **changes}
    return cleaned


def missing(entries: Entries, name: str) -> list[str]:
    """Keys of the entries without `name`."""
    return [key for key, entry in entries.items() if entry.get(name) is None]


def _text(image: Path, extension: str) -> str:
    file = image.with_suffix(extension)
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name} beside it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
