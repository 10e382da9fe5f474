"""Which images and caption files a folder holds."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from library.data.config import SubsetSettings
from library.data.findings import Findings, measure
from library.data.folders import IMAGE_EXTENSIONS
from library.data.info_cache import InfoCache
from library.data.items import ImageItem

logger = logging.getLogger(__name__)

UNREAD_EXTENSIONS = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2"})
"""Images in these formats are not used, which is said once a folder."""


@dataclass
class FolderImages:
    """The images of one folder."""

    images: list[Path] = field(default_factory=list)
    """All of them, also those that cannot be read."""
    items: list[ImageItem] = field(default_factory=list)


def scan_folder(number: int, subset: SubsetSettings, findings: Findings, thorough: bool) -> FolderImages:
    """The images of the folder of `subset` with sizes and captions, sorted by name; `thorough` decodes them."""
    folder = subset.image_dir
    assert folder is not None
    entries = sorted((entry for entry in os.scandir(folder) if _is_file(entry)), key=lambda entry: entry.name)
    names = [entry.name for entry in entries]
    endings = [os.path.splitext(name)[1] for name in names]
    found = FolderImages([folder / name for name, ending in zip(names, endings) if ending in IMAGE_EXTENSIONS])
    not_used = UNREAD_EXTENSIONS - IMAGE_EXTENSIONS
    unread = [name for name, ending in zip(names, endings) if ending.lower() in not_used]
    if unread:
        logger.warning("%s: %d files are not used, such as %s", folder, len(unread), unread[0])
    cache = InfoCache(folder, entries) if subset.cache_info else None
    if cache is not None:
        sizes = {path: cache.size(path.name) for path in found.images if path not in findings.sizes}
        findings.sizes |= {path: size for path, size in sizes.items() if size is not None}
    measure(found.images, findings, thorough)
    captions = _Captions(subset, names, cache, findings)
    for path in found.images:
        size = findings.sizes.get(path)
        if size is not None:
            caption = captions.of(path, size)
            found.items.append(ImageItem(path, caption, subset.num_repeats, subset.is_reg, number, size))
    if cache is not None:
        cache.save()
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    """A link that leads to itself is none, as one that leads nowhere."""
    try:
        return entry.is_file()
    except OSError:
        return False


class _Captions:
    """The captions of one folder."""

    def __init__(self, subset: SubsetSettings, names: list[str], cache: InfoCache | None, findings: Findings) -> None:
        self.subset = subset
        self.names = set(names)
        self.cache = cache
        self.findings = findings
        self.extension = _extension(subset, names)
        self.with_lines = subset.captions.enable_wildcard

    def of(self, path: Path, size: tuple[int, int]) -> str:
        """The caption of an image: its file, else the class tokens."""
        file = self._file(path)
        if file is None:
            caption = self.subset.class_tokens or ""
            if not caption:
                self.findings.uncaptioned[path] = self.subset
        else:
            known = self.cache.caption(path.name, file, self.with_lines) if self.cache else None
            caption = self._read(path.with_name(file)) if known is None else known
        bad = self.findings.bad_captions
        if self.cache is not None and (file is None or not bad or path.with_name(file) not in bad):
            self.cache.remember(path.name, size, caption, file, self.with_lines)
        return caption

    def _file(self, path: Path) -> str | None:
        parts = path.stem.split("_")
        stems = [path.stem, *(["_".join(parts[:-4])] if len(parts) >= 5 else [])]  # name_cx_cy_w_h: a face position
        return next((stem + self.extension for stem in stems if stem + self.extension in self.names), None)

    def _read(self, file: Path) -> str:
        """The first line, or all lines that are not blank when wildcards are on."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self.findings.bad_captions[file] = f"not UTF-8 text ({error.reason} at byte {error.start})"
            return ""
        if not text:
            self.findings.bad_captions[file] = "empty; write a caption or delete the file"
            return ""
        lines = text.split("\n")
        if self.with_lines:
            return "\n".join(line.strip() for line in lines if line.strip())
        return lines[0].strip()


def _extension(subset: SubsetSettings, names: list[str]) -> str:
    """The caption extension of a folder: .txt where the user chose none and no .caption file exists."""
    if subset.extension_chosen or any(name.endswith(subset.caption_extension) for name in names):
        return subset.caption_extension
    if any(name.endswith(".txt") for name in names):
        logger.info("%s: no %s files, captions are read from .txt", subset.image_dir, subset.caption_extension)
        return ".txt"
    return subset.caption_extension
