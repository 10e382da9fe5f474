"""What is wrong with the images and captions of a run, and how the user hears of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from library.data.config import SubsetSettings
from library.data.pixels import image_size, load_rgb

logger = logging.getLogger(__name__)

NUM_LISTED = 20
"""So many file names stand in a message; the rest are counted."""


@dataclass
class Findings:
    """Sizes seen so far and everything that is wrong, with the reason of each."""

    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    corrupt: dict[Path, str] = field(default_factory=dict)
    uncaptioned: dict[Path, SubsetSettings] = field(default_factory=dict)
    bad_captions: dict[Path, str] = field(default_factory=dict)
    bad_metadata: dict[str, str] = field(default_factory=dict)
    """`file: key "name"` -> why that entry of a metadata file cannot be used."""
    unpaired: dict[Path, str] = field(default_factory=dict)
    """Images and conditioning images that do not go together."""


def measure(images: Iterable[Path], findings: Findings, thorough: bool) -> None:
    """Note the sizes of images that are not known yet; `thorough` decodes them all."""
    new = [path for path in images if (thorough or path not in findings.sizes) and path not in findings.corrupt]

    def measured(path: Path) -> tuple[int, int] | str:
        try:
            size = findings.sizes.get(path) or image_size(path)
            if thorough:
                load_rgb(path)
        except ValueError as error:
            return str(error)
        return size

    if thorough:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            answers = list(pool.map(measured, new))
    else:
        answers = [measured(path) for path in new]
    for path, answer in zip(new, answers, strict=True):
        if isinstance(answer, str):
            findings.corrupt[path] = answer
            findings.sizes.pop(path, None)
        else:
            findings.sizes[path] = answer


def report(findings: Findings, *, allow_uncaptioned: bool, skip_corrupt: bool) -> None:
    """Log what the user allowed and raise one ValueError for the rest."""
    mistakes = []
    if findings.corrupt:
        heading = f"{len(findings.corrupt)} image(s) cannot be read"
        if skip_corrupt:
            logger.warning("%s and are left out:\n%s", heading, listed(findings.corrupt))
        else:
            mistakes.append(f"{heading}; repair or remove them, or use --skip_corrupt:\n{listed(findings.corrupt)}")
    for heading, reasons in (
        ("caption file(s) cannot be used", findings.bad_captions),
        ("entries of metadata files cannot be used", findings.bad_metadata),
        ("image(s) and conditioning image(s) do not go together", findings.unpaired),
    ):
        if reasons:
            mistakes.append(f"{len(reasons)} {heading}:\n{listed(reasons)}")
    if findings.uncaptioned:
        heading = f"{len(findings.uncaptioned)} image(s) have no caption"
        lines = listed({path: missing_caption(path, subset) for path, subset in findings.uncaptioned.items()})
        if allow_uncaptioned:
            logger.warning("%s:\n%s", heading, lines)
        else:
            cure = (
                "write caption files (--caption_extension names their ending), set class_tokens, or use "
                "--allow_uncaptioned"
            )
            mistakes.append(f"{heading}; {cure}:\n{lines}")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def missing_caption(path: Path, subset: SubsetSettings) -> str:
    """What an image without a caption lacks."""
    if subset.metadata_file is not None:
        return f"neither caption nor tags in {subset.metadata_file.name}"
    return f"no {path.stem}{subset.caption_extension}"


def listed(reasons: Mapping[Path, str] | Mapping[str, str]) -> str:
    """One line for each, up to a number, and how many more there are."""
    lines = [f"  {name}: {reason}" for name, reason in reasons.items()]
    more = len(lines) - NUM_LISTED
    return "\n".join(lines[:NUM_LISTED] + ([f"  and {more} more"] if more > 0 else []))
