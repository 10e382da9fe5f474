"""What a dataset will be like in training, and what is wrong with it, found out before anything slow starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from library.data.config import DatasetConfig, DatasetSettings
from library.data.duplicates import Look, look_at_all
from library.data.findings import Findings
from library.data.image_set import ImageSet, bucket_sizes, put_into_buckets
from library.data.scan import ScannedDataset, survey
from library.data.summary import tag_frequency

HIGHEST_STEPS = 1600
"""Steps of a run whose length is not given, as --max_train_steps has it."""


class Severity(Enum):
    """How bad a finding is."""

    STOPS = "stops the training"
    HURTS = "hurts the result"
    NOTE = "good to know"


@dataclass(frozen=True)
class Remark:
    """One file, folder or bucket of a finding."""

    name: str
    text: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of mistake, everything that has it, and what to do about it."""

    kind: str
    """A word for programs, such as `corrupt`."""
    severity: Severity
    title: str
    remarks: tuple[Remark, ...]
    cure: str


@dataclass(frozen=True)
class Asked:
    """What is known of the training that is to come."""

    accumulation: int = 1
    epochs: int | None = None
    max_tokens: int = 75
    count_tokens: Callable[[str], int] | None = None
    """None estimates."""
    allow_uncaptioned: bool = False
    skip_corrupt: bool = False


@dataclass
class Collection:
    """Everything that was seen, for the checks."""

    config: DatasetConfig
    asked: Asked
    findings: Findings
    datasets: list[ImageSet]
    looks: dict[Path, Look]
    held_out: list[ImageSet] = field(default_factory=list)
    """Images for validation, one set for each dataset that has some."""
    misfits: dict[Path, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """What reading folders and settings warned of."""

    @property
    def num_batches(self) -> int:
        """Batches of one epoch of one process."""
        return sum(dataset.num_batches for dataset in self.datasets)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch of one process."""
        return -(-self.num_batches // self.asked.accumulation)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return HIGHEST_STEPS if self.asked.epochs is None else self.asked.epochs * self.steps_per_epoch


def collect(read_config: Callable[[], DatasetConfig], asked: Asked) -> Collection:
    """See every folder, caption and image of the datasets; nothing that is wrong with these raises.

    `read_config` may raise a ValueError of its own, which passes through.
    """
    with _warnings() as log:
        config = read_config()
        scanned, findings = survey(config, thorough=False)
    sets = [(settings, found) for settings, found in zip(config.datasets, scanned, strict=True)]
    held_out = [(settings, found.validation) for settings, found in sets if found.validation]
    paths = list(dict.fromkeys(item.path for _, found in [*sets, *held_out] for item in found.items))
    looks: dict[Path, Look] = {}
    for path, look in look_at_all(paths).items():
        if isinstance(look, str):
            findings.corrupt[path] = look
        else:
            looks[path] = look
    seen = Collection(config, asked, findings, [], looks, log=log)
    seen.datasets += [_usable(settings, found, seen) for settings, found in sets]
    seen.held_out += [_usable(settings, found, seen) for settings, found in held_out]
    return seen


def _usable(settings: DatasetSettings, found: ScannedDataset, seen: Collection) -> ImageSet:
    """The images of `found` that can be read and fit a bucket, in their buckets."""
    sizes, items = bucket_sizes(settings), []
    for item in found.items:
        if item.path in seen.looks:
            try:
                sizes.fit(item.size)
                items.append(item)
            except ValueError as error:
                seen.misfits[item.path] = str(error)
    return put_into_buckets(settings, replace(found, items=items))


def as_table(seen: Collection, findings: list[Finding]) -> dict[str, Any]:
    """Everything as JSON knows it."""
    return {
        "source": str(seen.config.file) if seen.config.file else None,
        "hurts": any(finding.severity is not Severity.NOTE for finding in findings),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity.name.lower(),
                "title": finding.title,
                "cure": finding.cure,
                "items": [{"name": remark.name, "text": remark.text} for remark in finding.remarks],
            }
            for finding in findings
        ],
        "datasets": [_dataset_table(dataset) for dataset in seen.datasets],
        "validation_images": sum(len(dataset.items) for dataset in seen.held_out),
        "batches_per_epoch": seen.num_batches,
        "steps_per_epoch": seen.steps_per_epoch,
        "epochs": seen.asked.epochs,
        "total_steps": None if seen.asked.epochs is None else seen.total_steps,
    }


def _dataset_table(dataset: ImageSet) -> dict[str, Any]:
    settings = dataset.settings
    return {
        "resolution": list(settings.resolution),
        "batch_size": settings.batch_size,
        "effective_batch_size": effective_batch_size(dataset),
        "images": len(dataset.items),
        "images_with_repeats": num_uses(dataset),
        "batches": dataset.num_batches,
        "subsets": [
            {
                "image_dir": str(subset.source),
                "images": sum(item.subset == number for item in dataset.items),
                "num_repeats": subset.num_repeats,
                "is_reg": subset.is_reg,
            }
            for number, subset in enumerate(settings.subsets)
        ],
        "buckets": [
            {"size": list(bucket.size), "images": len(bucket.items), "images_with_repeats": bucket.count}
            for bucket in dataset.buckets
        ],
        "tags": tag_frequency(dataset),
    }


def num_uses(dataset: ImageSet) -> int:
    """Images with their repeats."""
    return sum(bucket.count for bucket in dataset.buckets)


def effective_batch_size(dataset: ImageSet) -> float:
    """Images in a batch on average."""
    return num_uses(dataset) / max(dataset.num_batches, 1)


def counted(number: int, thing: str, things: str = "") -> str:
    """`1 image`, `2 images`."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what the data room warns of, in place of logging it."""
    log: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append(record.getMessage())

    room = logging.getLogger(__name__.rpartition(".")[0])
    collector, passes_on = Collector(logging.WARNING), room.propagate
    room.addHandler(collector)
    room.propagate = False
    try:
        yield log
    finally:
        room.removeHandler(collector)
        room.propagate = passes_on
