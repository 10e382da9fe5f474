"""How images become batches: the order of an epoch, and the making of one batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random

import torch
from torch.utils.data import Dataset

from library.data.config import DatasetConfig
from library.data.held_out import steady
from library.data.image_set import ImageSet, log_buckets, put_into_buckets
from library.data.items import Batch, BatchRequest
from library.data.rows import (
    conditioning_of,
    latents_of,
    make_row,
    masks_of,
    pixels_of,
    sizes_of,
    text_lengths_of,
    text_of,
)
from library.data.scan import scan_images


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of an epoch before it is known who makes it, and when."""

    dataset: int
    items: tuple[int, ...]
    origins: tuple[tuple[int, ...], ...]
    """For each item what decides its draws: seed, epoch, dataset, item and which use of it."""

    @property
    def draws(self) -> tuple[int, ...]:
        """One number for each item. They are made when the batch is, since a long epoch should begin at once."""
        return tuple(_draw(*origin) for origin in self.origins)


@dataclass
class TrainingSet(Dataset[Batch]):
    """All datasets of a run. Making a batch depends on the request alone, so any process can make any batch."""

    datasets: list[ImageSet]
    prior_loss_weight: float = 1.0
    config: DatasetConfig = field(default_factory=lambda: DatasetConfig(()))
    validation: TrainingSet | None = None
    """The images that are held out, each once in an epoch; None when there are none."""

    @property
    def num_train_images(self) -> int:
        """Training images times their repeats."""
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images times their own repeats, used or not."""
        return sum(dataset.num_reg_images for dataset in self.datasets)

    @property
    def num_batches(self) -> int:
        """Batches of one epoch, over all ranks."""
        return sum(dataset.num_batches for dataset in self.datasets)

    @property
    def with_held_out(self) -> list[ImageSet]:
        """All datasets, and those of the images that are held out."""
        return self.datasets + (self.validation.datasets if self.validation else [])

    @property
    def keeps_prior(self) -> bool:
        """Whether the target of some images is the untrained model's answer."""
        return any(subset.keeps_prior for dataset in self.datasets for subset in dataset.settings.subsets)

    @property
    def latents_cached(self) -> bool:
        """Whether every image has latents in memory or on disk."""
        return all(item.latents or item.latents_file for dataset in self.datasets for item in dataset.items)

    def __len__(self) -> int:
        return self.num_batches

    def epoch_batches(self, seed: int, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch in their order; it depends on the images, `seed` and `epoch` and on nothing else.

        Every image stands in it as often as its repeats say, and no batch mixes buckets.
        """
        random = Random(f"order of epoch {epoch} from seed {seed}")
        planned: list[PlannedBatch] = []
        for number, dataset in enumerate(self.datasets):
            for bucket in dataset.buckets:
                uses = [(item, use) for item in bucket.items for use in range(dataset.items[item].num_repeats)]
                random.shuffle(uses)
                for start in range(0, len(uses), dataset.settings.batch_size):
                    rows = uses[start : start + dataset.settings.batch_size]
                    origins = tuple((seed, epoch, number, item, use) for item, use in rows)
                    planned.append(PlannedBatch(number, tuple(item for item, _ in rows), origins))
        random.shuffle(planned)
        return planned

    def __getitem__(self, request: BatchRequest) -> Batch:
        """The batch that `request` asks for; a ValueError names the image that cannot be read."""
        dataset = self.datasets[request.dataset]
        items = [dataset.items[index] for index in request.items]
        subsets = [dataset.settings.subsets[item.subset] for item in items]
        rows = [make_row(item, dataset, Random(draw), request) for item, draw in zip(items, request.draws, strict=True)]
        weights = [self.prior_loss_weight if item.is_reg else 1.0 for item in items]
        multiplier = dataset.settings.network_multiplier
        return Batch(
            captions=[row.caption for row in rows],
            loss_weights=torch.tensor(weights) * request.weight,
            pixels=pixels_of(rows),
            latents=latents_of(rows),
            text=text_of(rows, dataset.text_cache),
            text_lengths=text_lengths_of(rows, dataset.text_cache),
            masks=masks_of(rows, items[0].bucket),
            conditioning=conditioning_of(rows),
            sizes=sizes_of(items, rows),
            keep_prior=tuple(i for i, subset in enumerate(subsets) if subset.keeps_prior),
            network_multipliers=None if multiplier == 1 else torch.full((len(rows),), float(multiplier)),
            paths=[str(item.path) for item in items],
            epoch=request.epoch,
            step=request.step,
        )


def load_training_set(
    config: DatasetConfig,
    *,
    prior_loss_weight: float = 1.0,
    allow_uncaptioned: bool = False,
    skip_corrupt: bool = False,
) -> TrainingSet:
    """Find the images of `config` and put them into buckets; what was found is logged.

    ValueError lists images that cannot be read or that fit no bucket, and images without a caption.
    """
    scanned = scan_images(config, allow_uncaptioned=allow_uncaptioned, skip_corrupt=skip_corrupt)
    pairs = list(zip(config.datasets, scanned, strict=True))
    datasets = [put_into_buckets(settings, found) for settings, found in pairs]
    for number, dataset in enumerate(datasets, 1):
        log_buckets(f"dataset {number}", dataset)
    held_out = [put_into_buckets(steady(settings), found.validation) for settings, found in pairs if found.validation]
    for number, dataset in enumerate(held_out, 1):
        log_buckets(f"validation dataset {number}", dataset)
    validation = TrainingSet(held_out, prior_loss_weight, config) if held_out else None
    return TrainingSet(datasets, prior_loss_weight, config, validation)


def _draw(*origin: int) -> int:
    """A number that seeds the draws of one use of an image; equal for equal origins on every machine."""
    digest = hashlib.blake2b(repr(origin).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
