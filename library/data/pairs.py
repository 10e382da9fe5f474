"""Which conditioning image, or mask, belongs to which image."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from library.data.config import SubsetSettings
from library.data.findings import Findings, measure
from library.data.folders import IMAGE_EXTENSIONS
from library.data.items import ImageItem

logger = logging.getLogger(__name__)


def pair(
    items: Sequence[ImageItem], images: Sequence[Path], subset: SubsetSettings, findings: Findings, *,
    same_size: bool, thorough: bool,
) -> None:  # fmt: skip
    """Give every item the conditioning image of its stem; what does not go together goes to `findings`.

    `images` are all images of the folder, also those that cannot be read. With `same_size` both must have one
    size, since buckets are chosen by it.
    """
    folder = subset.conditioning_data_dir
    assert folder is not None
    if not folder.is_dir():
        raise ValueError(f"conditioning_data_dir {folder}: there is no such folder")
    partners = _by_stem(sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1] in IMAGE_EXTENSIONS))
    owners = _by_stem([path.name for path in images])
    chosen = {}
    for item in items:
        name = _choose(item.path.name, owners[item.path.stem], partners.get(item.path.stem, []))
        if name is None:
            findings.unpaired[item.path] = _why(item.path, partners.get(item.path.stem, []), folder)
        else:
            chosen[item.path] = folder / name
    used_of = _by_stem([path.name for path in chosen.values()])
    for stem, names in partners.items():
        used = used_of.get(stem, [])
        if stem not in owners:
            findings.unpaired |= {folder / name: f"no image of this stem in {subset.image_dir}" for name in names}
        elif used:
            findings.unpaired |= {folder / name: f"{min(used)} is used" for name in names if name not in used}
    measure(chosen.values(), findings, thorough)
    shapes = 0
    for item in items:
        partner = chosen.get(item.path)
        if partner is None or partner not in findings.sizes:
            continue
        item.conditioning_path = partner
        size = findings.sizes[partner]
        if size != item.size and same_size:
            findings.unpaired[partner] = _wrong_size(size, item)
        shapes += abs(size[0] * item.size[1] - size[1] * item.size[0]) > max(item.size)
    if shapes and not same_size:
        logger.warning("%s: %d images have another shape than their images and are distorted to fit", folder, shapes)


def _by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    return stems


def _choose(name: str, owners: Sequence[str], partners: Sequence[str]) -> str | None:
    """The partner of an image: the only one of its stem, or among several the one of its whole name."""
    if name in partners:
        return name
    return partners[0] if len(partners) == 1 and len(owners) == 1 else None


def _why(path: Path, partners: Sequence[str], folder: Path) -> str:
    if not partners:
        return f"no conditioning image; expected {folder / path.stem} with the ending of an image"
    return f"{' and '.join(partners)} in {folder} may be meant; expected one image of each stem"


def _wrong_size(size: tuple[int, int], item: ImageItem) -> str:
    return (
        f"{size[0]}x{size[1]} pixels, but {item.path.name} has {item.size[0]}x{item.size[1]}; "
        "expected the same size with enable_bucket"
    )
