"""Captions and image sizes that a folder remembers from the last run (`metadata_cache.json`), if still true."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from library.files.atomic import replacing

logger = logging.getLogger(__name__)

NAME = "metadata_cache.json"

State = list[int]
"""Size in bytes and time of the last change (ns) of a file."""


class InfoCache:
    """What is remembered of one folder; nothing counts whose file has another size or time than then.

    The file holds, for each image path, `caption` and `resolution`; `image` and `caption_file` say of which files.
    Images are told apart by their whole name. A file without the latter two, or a broken one, is made anew.
    """

    def __init__(self, folder: Path, entries: Iterable[os.DirEntry[str]]) -> None:
        self.path = folder / NAME
        self._files = {entry.name: entry for entry in entries}
        self._old = self._read() if NAME in self._files else {}
        self._new: dict[str, Any] = {}
        self._states: dict[str, State] = {}

    def size(self, name: str) -> tuple[int, int] | None:
        """Width and height of an image that has not changed."""
        old = self._old.get(name, {})
        size = old.get("resolution")
        valid = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        return (size[0], size[1]) if valid and old.get("image") == self._state(name) else None

    def caption(self, name: str, caption_file: str, with_lines: bool) -> str | None:
        """The caption of an image as it was read from a file that has not changed, `with_lines` all of them."""
        old = self._old.get(name, {})
        text = old.get("caption")
        if not isinstance(text, str) or old.get("caption_file") != [caption_file, *self._state(caption_file)]:
            return None
        return text if old.get("lines") == with_lines else None

    def remember(
        self, name: str, size: tuple[int, int], caption: str, caption_file: str | None, with_lines: bool
    ) -> None:
        """What is true of an image now; without a caption file its caption is not looked up the next time."""
        entry: dict[str, Any] = {"caption": caption, "resolution": list(size), "image": self._state(name)}
        if caption_file is not None:
            entry |= {"caption_file": [caption_file, *self._state(caption_file)], "lines": with_lines}
        self._new[name] = entry

    def save(self) -> None:
        """Write what was remembered if it differs from the file; a folder that cannot be written to is no mistake."""
        if self._new == self._old:
            return
        content = {str(self.path.with_name(name)): entry for name, entry in self._new.items()}
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s); captions and sizes are read again the next time", self.path, error
            )

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        entries = {key.replace("\\", "/").rpartition("/")[2]: entry for key, entry in content.items()}
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}

    def _state(self, name: str) -> State:
        known = self._states.get(name)
        if known is None:
            entry = self._files.get(name)
            stat = entry.stat() if entry is not None else None
            known = self._states[name] = [] if stat is None else [stat.st_size, stat.st_mtime_ns]
        return known
