"""Which images a metadata file names, and what it says about each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.config import SubsetSettings
from library.data.findings import Findings, measure
from library.data.folders import IMAGE_EXTENSIONS
from library.data.items import ImageItem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What stands in the file under one key."""

    key: str
    caption: str
    tags: str
    size: tuple[int, int] | None


@dataclass
class Found:
    """The images of one subset, with the text that tags are counted in."""

    items: list[ImageItem] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def scan_metadata(number: int, subset: SubsetSettings, findings: Findings, thorough: bool) -> Found:
    """The images that the metadata file of `subset` names, sorted by path; what is wrong goes to `findings`.

    A key is a whole path, or a path, file name or stem in image_dir. ValueError when the file itself is no
    metadata file.
    """
    file = subset.metadata_file
    assert file is not None
    places: dict[Path, Entry] = {}
    folders = _Folders()
    for entry in _entries(file, findings):
        answer = _locate(entry.key, subset.image_dir, folders)
        if isinstance(answer, str):
            findings.bad_metadata[_named(file, entry.key)] = answer
        elif answer in places:
            findings.bad_metadata[_named(file, entry.key)] = f"names {answer}, as key {places[answer].key!r} does"
        else:
            places[answer] = entry
    findings.sizes |= {path: entry.size for path, entry in places.items() if entry.size and path not in findings.sizes}
    measure(places, findings, thorough)
    found = Found()
    for path in sorted(places):
        if path not in findings.sizes:
            continue
        caption, tags = _texts(places[path], subset)
        if not caption:
            findings.uncaptioned[path] = subset
        found.items.append(ImageItem(path, caption, subset.num_repeats, False, number, findings.sizes[path]))
        found.tags.append(tags)
    _mention_rest(subset, set(places), folders)
    return found


class _Folders:
    """The images of folders, each listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def images(self, folder: Path) -> dict[str, list[str]]:
        """Stem -> names of the images in `folder`."""
        if folder not in self._listed:
            stems: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                stem, ending = os.path.splitext(name)
                if ending in IMAGE_EXTENSIONS:
                    stems.setdefault(stem, []).append(name)
            self._listed[folder] = stems
        return self._listed[folder]

    def find(self, path: Path) -> list[Path]:
        """The image that `path` names, or all images of that stem."""
        stems = self.images(path.parent)
        if path.name in stems.get(path.stem, ()):
            return [path]
        return [path.with_name(name) for name in stems.get(path.name, ())]


def _locate(key: str, image_dir: Path | None, folders: _Folders) -> Path | str:
    """The image that a key names, or what is wrong with the key."""
    # A key written on Windows is read elsewhere too.
    forms = dict.fromkeys([key, key.replace("\\", "/")])
    if not any(Path(form).is_absolute() for form in forms) and image_dir is None:
        return "a path that starts nowhere; expected image_dir in the dataset file, or whole paths as keys"
    for form in forms:
        found = folders.find(Path(form) if image_dir is None else image_dir / form)
        if not found and image_dir is not None and _inside(Path(form), image_dir):
            found = folders.find(Path(form))  # a path from where the tool was run
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            return f"names {names} alike; expected the file name with its ending"
        if found:
            return found[0]
    return f"there is no such image in {image_dir or Path(key).parent}"


def _inside(path: Path, folder: Path) -> bool:
    return os.path.abspath(path.parent).startswith(os.path.abspath(folder))


def _entries(file: Path, findings: Findings) -> Iterator[Entry]:
    """The well-formed entries of the file; the others go to `findings`."""
    for key, value in read_entries(file).items():
        answer = _entry(key, value)
        if isinstance(answer, Entry):
            yield answer
        else:
            findings.bad_metadata[_named(file, key)] = answer


def _named(file: Path, key: str) -> str:
    return f"{file}: key {json.dumps(key, ensure_ascii=False)}"


def _entry(key: str, value: Any) -> Entry | str:
    if not key or "\0" in key:
        return "expected a path, a file name or a stem"
    if not isinstance(value, dict):
        return f"{_shown(value)} stands there; expected caption, tags and image_size in braces"
    texts = {}
    for name in ("caption", "tags"):
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            return f"{name} = {_shown(text)}; expected text"
        texts[name] = text or ""
    size = value.get("image_size")
    if size is not None:
        whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        if not whole:
            return f"image_size = {_shown(size)}; expected [width, height] in pixels"
        size = (size[0], size[1])
    return Entry(key, texts["caption"], texts["tags"], size)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def read_entries(file: Path) -> dict[str, Any]:
    """Key -> entry of a .json or .jsonl file; ValueError names the file and what is wrong."""
    kind = file.suffix.lower()
    if kind not in (".json", ".jsonl"):
        raise ValueError(f"metadata_file {file}: expected a file that ends in .json or .jsonl")
    if not file.is_file():
        raise ValueError(f"metadata_file {file}: there is no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if kind == ".jsonl":
        return _read_lines(file, text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a valid .json file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{file}: expected {{"image": {{"caption": "..."}}, ...}}, got a {type(content).__name__}')
    return content


def _read_lines(file: Path, text: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is not valid JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
            raise ValueError(f'{file}: line {number}: expected {{"image_path": "...", "caption": "..."}}')
        if entry["image_path"] in entries:
            raise ValueError(f"{file}: line {number} names {entry['image_path']} again; keep one line for each image")
        entries[entry["image_path"]] = entry
    return entries


def _texts(entry: Entry, subset: SubsetSettings) -> tuple[str, str]:
    """The caption of an entry with its tags behind it, and the tags alone."""
    separator = subset.captions.caption_separator
    caption, tags = entry.caption, entry.tags
    if not subset.captions.enable_wildcard:
        return (f"{caption}{separator}{tags}" if caption and tags else caption or tags), tags
    tags = tags.replace("\n", separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    if not lines:
        return tags, tags
    return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines), tags


def _mention_rest(subset: SubsetSettings, used: set[Path], folders: _Folders) -> None:
    if subset.image_dir is None:
        return
    images = [name for names in folders.images(subset.image_dir).values() for name in names]
    rest = [name for name in images if subset.image_dir / name not in used]
    if rest:
        file = subset.metadata_file
        logger.warning(
            "%s: %d images are not used, since %s does not name them; %s is one",
            subset.image_dir,
            len(rest),
            file,
            rest[0],
        )
