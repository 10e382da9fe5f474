"""Which previews the report page shows, and how they are put into it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from library.train.history import Picture

MOST_PROMPTS = 8
MOST_MOMENTS = 12
"""Pictures of one prompt; with more, the first, the last and some between are shown."""
SIDE = 224
"""Pixels of the longer side of a picture on the page; a click opens the whole one."""
QUALITY = 82


def chosen_moments(pictures: Sequence[Picture]) -> Iterator[tuple[str, list[Picture]]]:
    """Prompts in their order, with the pictures to show of each."""
    by_prompt: dict[tuple[int, str], list[Picture]] = {}
    for picture in list(pictures):
        by_prompt.setdefault((picture.index, picture.prompt), []).append(picture)
    for (_, prompt), moments in sorted(by_prompt.items(), key=lambda entry: entry[0])[:MOST_PROMPTS]:
        count = len(moments)
        if count > MOST_MOMENTS:
            moments = [moments[i * (count - 1) // (MOST_MOMENTS - 1)] for i in range(MOST_MOMENTS)]
        yield prompt, moments


class Thumbnails:
    """Small copies of pictures as data: URLs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """What paths are relative to."""
        self._made: dict[Path, str] = {}

    def data_url(self, path: Path) -> str | None:
        """The picture at `path`; None when it is gone or broken."""
        if path not in self._made:
            try:
                self._made[path] = _as_data_url(self.folder / path)
            except (OSError, ValueError):
                return None
        return self._made[path]


def _as_data_url(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
