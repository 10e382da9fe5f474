"""Which images and captions the folders and metadata files hold, and which of them are held out for validation."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.findings import Findings, report
from library.data.folder_scan import FolderImages, scan_folder
from library.data.items import ImageItem
from library.data.kinds import Kind
from library.data.metadata_file import Found, scan_metadata
from library.data.pairs import pair

logger = logging.getLogger(__name__)


@dataclass
class ScannedDataset:
    """What one dataset holds."""

    items: list[ImageItem]
    """Training images in order, then the regularisation images that are used."""
    captions: list[list[str]]
    """The text that tags are counted in, of every image found, for each subset: its caption, or its tags."""
    num_train_images: int
    """Training images times their repeats."""
    num_reg_images: int
    """Regularisation images times their own repeats, before they are matched to the training images."""
    validation: ScannedDataset | None = None
    """The images that are held out, each once; None when there are none."""


def scan_images(config: DatasetConfig, *, allow_uncaptioned: bool, skip_corrupt: bool) -> list[ScannedDataset]:
    """Find images, sizes and captions of every dataset, regularisation images matched to the training images.

    One ValueError lists all images that cannot be read (unless `skip_corrupt`, which leaves them out after
    decoding every file to be sure), all without a caption (unless `allow_uncaptioned`), all caption files that
    are empty or not UTF-8, entries of metadata files that cannot be used, and images without their pair.
    """
    scanned, findings = survey(config, thorough=skip_corrupt)
    report(findings, allow_uncaptioned=allow_uncaptioned, skip_corrupt=skip_corrupt)
    if not any(dataset.num_train_images for dataset in scanned):
        places = ", ".join(str(subset.source) for dataset in config.datasets for subset in dataset.subsets)
        why = "; validation_split holds all of them out" if any(dataset.validation for dataset in scanned) else ""
        raise ValueError(
            f"no training images were found in: {places or 'no folder, since every num_repeats is 0'}{why}"
        )
    return scanned


def survey(config: DatasetConfig, *, thorough: bool) -> tuple[list[ScannedDataset], Findings]:
    """What every dataset holds, and what is wrong with it; `thorough` decodes every image."""
    findings = Findings()
    found = [_find(dataset, findings, thorough) for dataset in config.datasets]
    held_out = {
        _place(item.path)
        for dataset, subsets in zip(config.datasets, found, strict=True)
        for settings, subset in zip(dataset.subsets, subsets, strict=True)
        if dataset.validation_split > 0 and not settings.is_reg
        for item in chosen_for_validation(subset.items, dataset.validation_split, dataset.validation_seed)
    }
    return [_scanned(*pair, held_out) for pair in zip(config.datasets, found, strict=True)], findings


def chosen_for_validation(items: list[ImageItem], split: float, seed: int) -> list[ImageItem]:
    """The share `split` of `items` that is held out: what stands at the end when `seed` has shuffled them."""
    order = list(items)
    Random(seed).shuffle(order)
    num_train = math.ceil(len(order) * (1 - split) - 1e-9)  # 10 * (1 - 0.7) is a little more than 3
    return order[num_train:]


def _find(dataset: DatasetSettings, findings: Findings, thorough: bool) -> list[Found]:
    """The images of each subset, before any of them is held out."""
    seen: set[Hashable] = set()
    answer = []
    for number, subset in enumerate(dataset.subsets):
        place = _identity(subset)
        found = Found()
        if place in seen:
            logger.warning("%s stands twice in one dataset; the first counts", subset.source)
        elif subset.image_dir is not None and not subset.image_dir.is_dir():
            logger.warning("%s is not used: there is no such folder", subset.image_dir)
        else:
            found = _find_in_subset(number, subset, dataset, findings, thorough)
            if not found.items:
                logger.warning("%s is not used: it holds no images", subset.source)
        seen.add(place)
        answer.append(found)
    return answer


def _identity(subset: SubsetSettings) -> Hashable:
    """Two subsets of one dataset with equal identities are one subset that was written down twice."""
    paths = [subset.metadata_file] if subset.kind is Kind.METADATA else [subset.image_dir, subset.conditioning_data_dir]
    return tuple(path and _place(path) for path in paths)


def _place(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path))


def _find_in_subset(
    number: int, subset: SubsetSettings, dataset: DatasetSettings, findings: Findings, thorough: bool
) -> Found:
    if subset.kind is Kind.METADATA:
        return scan_metadata(number, subset, findings, thorough)
    folder: FolderImages = scan_folder(number, subset, findings, thorough)
    if subset.kind is Kind.CONDITIONING:
        pair(folder.items, folder.images, subset, findings, same_size=dataset.enable_bucket, thorough=thorough)
    return Found(folder.items, [item.caption for item in folder.items])


def _scanned(dataset: DatasetSettings, found: list[Found], held_out: set[str]) -> ScannedDataset:
    """The images of a dataset without those that are held out, which stand beside it.

    An image that one dataset holds out is trained on by none.
    """
    kept = [_part(subset, held_out, inside=False) for subset in found]
    train = [item for subset in kept for item in subset.items if not item.is_reg]
    reg = [item for subset in kept for item in subset.items if item.is_reg]
    num_train = sum(item.num_repeats for item in train)
    num_reg = sum(item.num_repeats for item in reg)
    scanned = ScannedDataset(train + _matched(reg, num_train), [s.tags for s in kept], num_train, num_reg)
    taken = [_part(subset, held_out, inside=True) for subset in found]
    validation = [item for subset in taken for item in subset.items]
    if validation and dataset.validation_split > 0:
        for item in validation:
            item.num_repeats = 1
        scanned.validation = ScannedDataset(validation, [subset.tags for subset in taken], len(validation), 0)
    elif validation:
        logger.warning(
            "%d images of %s are not trained on here, since another dataset holds them out for validation",
            len(validation),
            ", ".join(str(subset.source) for subset in dataset.subsets),
        )
    return scanned


def _part(subset: Found, held_out: set[str], inside: bool) -> Found:
    """The images that are, or are not, held out; regularisation images never are."""
    if not held_out:
        return Found() if inside else subset
    rows = zip(subset.items, subset.tags, strict=True)
    chosen = [(i, t) for i, t in rows if (not i.is_reg and _place(i.path) in held_out) == inside]
    return Found([item for item, _ in chosen], [tags for _, tags in chosen])


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
    if not used:
        return []
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
