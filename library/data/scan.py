"""Which images and captions the folders hold."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from library.data.config import IMAGE_EXTENSIONS, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.items import ImageItem
from library.data.pixels import image_size, load_rgb

logger = logging.getLogger(__name__)

UNREAD_EXTENSIONS = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2"})
"""Images in these formats are not used, which is said once a folder."""

NUM_LISTED = 20
"""So many file names stand in a message; the rest are counted."""


@dataclass
class ScannedDataset:
    """What the folders of one dataset hold."""

    items: list[ImageItem]
    """Training images in order, then the regularisation images that are used."""
    captions: list[list[str]]
    """The captions of every image found, for each subset."""
    num_train_images: int
    """Training images times their repeats."""
    num_reg_images: int
    """Regularisation images times their own repeats, before they are matched to the training images."""


@dataclass
class Findings:
    """Sizes seen so far and everything that is wrong, with the reason of each."""

    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    corrupt: dict[Path, str] = field(default_factory=dict)
    uncaptioned: dict[Path, SubsetSettings] = field(default_factory=dict)
    bad_captions: dict[Path, str] = field(default_factory=dict)


def scan_images(config: DatasetConfig, *, allow_uncaptioned: bool, skip_corrupt: bool) -> list[ScannedDataset]:
    """Find images, sizes and captions of every dataset, regularisation images matched to the training images.

    One ValueError lists all images that cannot be read (unless `skip_corrupt`, which leaves them out after
    decoding every file to be sure), all without a caption (unless `allow_uncaptioned`) and all caption files that
    are empty or not UTF-8.
    """
    scanned, findings = survey(config, thorough=skip_corrupt)
    _report(findings, allow_uncaptioned=allow_uncaptioned, skip_corrupt=skip_corrupt)
    if not any(dataset.num_train_images for dataset in scanned):
        folders = ", ".join(str(subset.image_dir) for dataset in config.datasets for subset in dataset.subsets)
        raise ValueError(f"no training images were found in: {folders or 'no folder'}")
    return scanned


def survey(config: DatasetConfig, *, thorough: bool) -> tuple[list[ScannedDataset], Findings]:
    """What every dataset holds, and what is wrong with it; `thorough` decodes every image."""
    findings = Findings()
    return [_scan_dataset(dataset, findings, thorough) for dataset in config.datasets], findings


def _scan_dataset(dataset: DatasetSettings, findings: Findings, skip_corrupt: bool) -> ScannedDataset:
    captions: list[list[str]] = []
    train: list[ImageItem] = []
    reg: list[ImageItem] = []
    seen: set[str] = set()
    for number, subset in enumerate(dataset.subsets):
        place = os.path.normcase(os.path.abspath(subset.image_dir))
        found: list[ImageItem] = []
        if place in seen:
            logger.warning("%s stands twice in one dataset; the first counts", subset.image_dir)
        elif not subset.image_dir.is_dir():
            logger.warning("%s is not used: there is no such folder", subset.image_dir)
        else:
            found = _scan_folder(number, subset, findings, skip_corrupt)
            if not found:
                logger.warning("%s is not used: it holds no images", subset.image_dir)
        seen.add(place)
        captions.append([item.caption for item in found])
        (reg if subset.is_reg else train).extend(found)
    num_train = sum(item.num_repeats for item in train)
    num_reg = sum(item.num_repeats for item in reg)
    return ScannedDataset(train + _matched(reg, num_train), captions, num_train, num_reg)


def _scan_folder(number: int, subset: SubsetSettings, findings: Findings, skip_corrupt: bool) -> list[ImageItem]:
    names = sorted(entry.name for entry in os.scandir(subset.image_dir) if entry.is_file())
    images = [subset.image_dir / name for name in names if os.path.splitext(name)[1] in IMAGE_EXTENSIONS]
    unread = [name for name in names if os.path.splitext(name)[1].lower() in UNREAD_EXTENSIONS]
    if unread:
        logger.warning("%s: %d files are not used, such as %s", subset.image_dir, len(unread), unread[0])
    _measure(images, findings, skip_corrupt)
    extension, present = _extension(subset, names), set(names)
    items = []
    for path in images:
        if path in findings.sizes:
            caption = _caption(path, extension, present, subset, findings)
            items.append(ImageItem(path, caption, subset.num_repeats, subset.is_reg, number, findings.sizes[path]))
    return items


def _measure(images: list[Path], findings: Findings, thorough: bool) -> None:
    """Sizes of images that are not known yet; `thorough` decodes them."""
    new = [path for path in images if path not in findings.sizes and path not in findings.corrupt]

    def measured(path: Path) -> tuple[int, int] | str:
        try:
            size = image_size(path)
            if thorough:
                load_rgb(path)
        except ValueError as error:
            return str(error)
        return size

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(measured, new)) if thorough else [measured(path) for path in new]
    for path, answer in zip(new, answers, strict=True):
        if isinstance(answer, str):
            findings.corrupt[path] = answer
        else:
            findings.sizes[path] = answer


def _extension(subset: SubsetSettings, names: list[str]) -> str:
    """The caption extension of a folder: .txt where the user chose none and no .caption file exists."""
    if subset.extension_chosen or any(name.endswith(subset.caption_extension) for name in names):
        return subset.caption_extension
    if any(name.endswith(".txt") for name in names):
        logger.info("%s: no %s files, captions are read from .txt", subset.image_dir, subset.caption_extension)
        return ".txt"
    return subset.caption_extension


def _caption(path: Path, extension: str, names: set[str], subset: SubsetSettings, findings: Findings) -> str:
    """The caption of an image: its file, else the class tokens."""
    parts = path.stem.split("_")
    stems = [path.stem, *(["_".join(parts[:-4])] if len(parts) >= 5 else [])]  # name_cx_cy_w_h: a face position
    for stem in stems:
        if stem + extension in names:
            return _read_caption(path.with_name(stem + extension), subset, findings)
    if not subset.class_tokens:
        findings.uncaptioned[path] = subset
    return subset.class_tokens or ""


def _read_caption(file: Path, subset: SubsetSettings, findings: Findings) -> str:
    """The first line, or all lines that are not blank when wildcards are on."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        findings.bad_captions[file] = f"not UTF-8 text ({error.reason} at byte {error.start})"
        return ""
    if not text:
        findings.bad_captions[file] = "empty; write a caption or delete the file"
        return ""
    lines = text.split("\n")
    if subset.captions.enable_wildcard:
        return "\n".join(line.strip() for line in lines if line.strip())
    return lines[0].strip()


def _matched(reg: list[ImageItem], target: int) -> list[ImageItem]:
    """Regularisation images until their repeats reach `target`; when they run out, each gets one more in turn."""
    if not reg:
        return []
    used: list[ImageItem] = []
    count = 0
    for item in reg:
        if count >= target:
            break
        used.append(item)
        count += item.num_repeats
    missing = max(target - count, 0)
    for place, item in enumerate(used):
        item.num_repeats += missing // len(used) + (place < missing % len(used))
    if len(used) < len(reg):
        logger.warning(
            "%d of %d regularisation images are not used: there are more than training images",
            len(reg) - len(used),
            len(reg),
        )
    return used


def _report(findings: Findings, *, allow_uncaptioned: bool, skip_corrupt: bool) -> None:
    """Log what the user allowed and raise for the rest."""
    mistakes = []
    if findings.corrupt:
        heading = f"{len(findings.corrupt)} image(s) cannot be read"
        listed = _listed(findings.corrupt)
        if skip_corrupt:
            logger.warning("%s and are left out:\n%s", heading, listed)
        else:
            mistakes.append(f"{heading}; repair or remove them, or use --skip_corrupt:\n{listed}")
    if findings.bad_captions:
        listed = _listed(findings.bad_captions)
        mistakes.append(f"{len(findings.bad_captions)} caption file(s) cannot be used:\n{listed}")
    if findings.uncaptioned:
        heading = f"{len(findings.uncaptioned)} image(s) have no caption"
        listed = _listed({path: f"no {path.stem}{s.caption_extension}" for path, s in findings.uncaptioned.items()})
        if allow_uncaptioned:
            logger.warning("%s:\n%s", heading, listed)
        else:
            cure = (
                "write caption files (--caption_extension names their ending), set class_tokens, or use "
                "--allow_uncaptioned"
            )
            mistakes.append(f"{heading}; {cure}:\n{listed}")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _listed(reasons: dict[Path, str]) -> str:
    lines = [f"  {path}: {reason}" for path, reason in reasons.items()]
    more = len(lines) - NUM_LISTED
    return "\n".join(lines[:NUM_LISTED] + ([f"  and {more} more"] if more > 0 else []))
