"""How images become batches: buckets, the order of an epoch, and the making of one batch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data.buckets import Buckets, crop_condition
from library.data.cache_files import read_latents
from library.data.captions import is_dropped, render_caption
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.items import Batch, BatchRequest, CachedLatents, ImageItem, Sizes
from library.data.pixels import make_picture, to_pixels
from library.data.scan import ScannedDataset, scan_images
from library.data.text_cache_files import TextCache, stack_text
from library.data.text_variants import variant_caption
from library.files.formats import LatentFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """Images that are trained at one size."""

    size: tuple[int, int]
    """Width and height."""
    items: tuple[int, ...]
    """Indices into the dataset's items, in order."""
    count: int
    """Images times their repeats."""


@dataclass
class ImageSet:
    """One dataset of the configuration with its images."""

    settings: DatasetSettings
    items: list[ImageItem]
    buckets: list[Bucket]
    """Sorted by size."""
    captions: list[list[str]]
    """The text that tags are counted in, of every image found, for each subset: its caption, or its tags."""
    num_train_images: int
    num_reg_images: int
    mean_aspect_error: float
    latent_format: LatentFormat | None = None
    """Set when the latents of all items are cached."""
    text_cache: TextCache | None = None
    """Set when the captions of all items are cached in encoded form."""

    @property
    def num_batches(self) -> int:
        """Batches in an epoch; the last one of a bucket may be short."""
        return sum(-(-bucket.count // self.settings.batch_size) for bucket in self.buckets)


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of an epoch before it is known who makes it, and when."""

    dataset: int
    items: tuple[int, ...]
    draws: tuple[int, ...]


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
    def latents_cached(self) -> bool:
        """Whether every image has latents in memory or on disk."""
        return all(item.latents or item.latents_file for dataset in self.datasets for item in dataset.items)

    @property
    def text_cached(self) -> bool:
        """Whether every caption is cached in encoded form."""
        return all(dataset.text_cache for dataset in self.datasets)

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
                    draws = tuple(_draw(seed, epoch, number, item, use) for item, use in rows)
                    planned.append(PlannedBatch(number, tuple(item for item, _ in rows), draws))
        random.shuffle(planned)
        return planned

    def __getitem__(self, request: BatchRequest) -> Batch:
        """The batch that `request` asks for; a ValueError names the image that cannot be read."""
        dataset = self.datasets[request.dataset]
        items = [dataset.items[index] for index in request.items]
        subsets = [dataset.settings.subsets[item.subset] for item in items]
        rows = [
            _make_row(item, subset, dataset, Random(draw), request)
            for item, subset, draw in zip(items, subsets, request.draws, strict=True)
        ]
        weights = [self.prior_loss_weight if item.is_reg else 1.0 for item in items]
        multiplier = dataset.settings.network_multiplier
        return Batch(
            captions=[row.caption for row in rows],
            loss_weights=torch.tensor(weights) * request.weight,
            pixels=_pixels(rows),
            latents=_latents(rows),
            text=_text(rows, dataset),
            sizes=_sizes(items, rows),
            keep_prior=tuple(
                i for i, subset in enumerate(subsets) if subset.custom_attributes.get("diff_output_preservation")
            ),
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
        _log_buckets(f"dataset {number}", dataset)
    held_out = [put_into_buckets(settings, found.validation) for settings, found in pairs if found.validation]
    for number, dataset in enumerate(held_out, 1):
        _log_buckets(f"validation dataset {number}", dataset)
    validation = TrainingSet(held_out, prior_loss_weight, config) if held_out else None
    return TrainingSet(datasets, prior_loss_weight, config, validation)


def bucket_sizes(settings: DatasetSettings) -> Buckets:
    """The sizes at which the images of one dataset may be trained."""
    return Buckets(
        settings.resolution,
        settings.enable_bucket,
        settings.min_bucket_reso,
        settings.max_bucket_reso,
        settings.bucket_reso_steps,
        settings.bucket_no_upscale,
    )


def put_into_buckets(settings: DatasetSettings, scanned: ScannedDataset) -> ImageSet:
    """The images of one dataset in their buckets; ValueError lists those that fit none."""
    sizes = bucket_sizes(settings)
    members: dict[tuple[int, int], list[int]] = {}
    misfits, error_sum = [], 0.0
    for index, item in enumerate(scanned.items):
        try:
            fit = sizes.fit(item.size)
        except ValueError as error:
            misfits.append(f"  {item.path}: {error}")
            continue
        item.bucket, item.resized = fit.bucket, fit.resized
        if settings.subsets[item.subset].random_crop and not settings.enable_bucket and _covers(item.size, fit.bucket):
            item.resized = item.size  # a random crop without buckets is taken from the image as it is
        error_sum += abs(fit.aspect_error)
        members.setdefault(fit.bucket, []).append(index)
    if misfits:
        raise ValueError(f"{len(misfits)} image(s) fit no bucket:\n" + "\n".join(misfits))
    buckets = [
        Bucket(size, tuple(members[size]), sum(scanned.items[index].num_repeats for index in members[size]))
        for size in sorted(members)
    ]
    return ImageSet(
        settings,
        scanned.items,
        buckets,
        scanned.captions,
        scanned.num_train_images,
        scanned.num_reg_images,
        error_sum / max(len(scanned.items), 1),
    )


def _covers(size: tuple[int, int], bucket: tuple[int, int]) -> bool:
    return size[0] >= bucket[0] and size[1] >= bucket[1]


def _log_buckets(name: str, dataset: ImageSet) -> None:
    batch_size = dataset.settings.batch_size
    logger.info(
        "%s: %d images, %d with repeats, batch size %d, %d batches an epoch",
        name,
        len(dataset.items),
        sum(bucket.count for bucket in dataset.buckets),
        batch_size,
        dataset.num_batches,
    )
    for index, bucket in enumerate(dataset.buckets):
        logger.info("bucket %d: resolution %s, count: %d", index, bucket.size, bucket.count)
    if dataset.settings.enable_bucket:
        logger.info("mean aspect error of the images: %.4f", dataset.mean_aspect_error)
    short = [bucket for bucket in dataset.buckets if bucket.count < batch_size]
    if short:
        listed = ", ".join(f"{bucket.size} with {bucket.count}" for bucket in short)
        logger.warning("%s: buckets with fewer images than the batch size %d: %s", name, batch_size, listed)


def _draw(*origin: int) -> int:
    """A number that seeds the draws of one use of an image; equal for equal origins on every machine."""
    digest = hashlib.blake2b(repr(origin).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class _Row:
    """One image of a batch."""

    caption: str
    crop_ltrb: tuple[float, ...]
    flipped: bool
    picture: np.ndarray | None = None
    latents: Tensor | None = None
    text: dict[str, Tensor] | None = None


def _make_row(
    item: ImageItem, subset: SubsetSettings, dataset: ImageSet, random: Random, request: BatchRequest
) -> _Row:
    """Draws in the order: flip, crop, caption."""
    flipped = subset.flip_aug and random.random() < 0.5
    row = _Row("", crop_condition(item.size, item.bucket), flipped)
    cached = _cached(item, dataset, subset)
    if cached is not None:
        latents = cached.flipped if flipped else cached.latents
        assert latents is not None, f"{item.path} was cached without its mirror image"
        row.latents = torch.as_tensor(latents)
        row.crop_ltrb = cached.crop_ltrb
    else:
        row.picture = _picture(item, subset, random, flipped)
    if dataset.text_cache is not None:
        row.caption, row.text = _cached_text(item, subset, dataset.text_cache, random, request.epoch)
        return row
    row.caption = render_caption(
        item.caption,
        subset.captions,
        random,
        epoch=request.epoch,
        step=request.step,
        total_steps=request.total_steps,
    )
    return row


def _cached(item: ImageItem, dataset: ImageSet, subset: SubsetSettings) -> CachedLatents | None:
    if item.latents is not None or item.latents_file is None:
        return item.latents
    assert dataset.latent_format is not None
    return read_latents(item.latents_file, dataset.latent_format, item, flipped=subset.flip_aug)


def _cached_text(
    item: ImageItem, subset: SubsetSettings, cache: TextCache, random: Random, epoch: int
) -> tuple[str, dict[str, Tensor]]:
    """The caption used this time and its encoding: the empty one when it is dropped, else one of the variants."""
    if is_dropped(subset.captions, random, epoch):
        return "", cache.text(item, None)
    variant = random.randrange(item.text_variants)
    return variant_caption(item, subset.captions, variant), cache.text(item, variant)


def _picture(item: ImageItem, subset: SubsetSettings, random: Random, flipped: bool) -> np.ndarray:
    try:
        place = random if subset.random_crop else None
        picture = make_picture(item.path, item.resized, item.bucket, subset.resize_interpolation, place)
    except ValueError as error:
        raise ValueError(f"{item.path} cannot be read: {error}; repair or remove it") from error
    return picture[:, ::-1] if flipped else picture


def _pixels(rows: Sequence[_Row]) -> Tensor | None:
    pictures = [row.picture for row in rows if row.picture is not None]
    return to_pixels(pictures) if pictures else None


def _latents(rows: Sequence[_Row]) -> Tensor | None:
    latents = [row.latents for row in rows if row.latents is not None]
    return torch.stack(latents) if latents else None


def _text(rows: Sequence[_Row], dataset: ImageSet) -> dict[str, Tensor]:
    found = [row.text for row in rows if row.text is not None]
    return stack_text(found, dataset.text_cache.fmt) if dataset.text_cache is not None else {}


def _sizes(items: Sequence[ImageItem], rows: Sequence[_Row]) -> Sizes:
    """Size conditions; the left edge of a mirrored image is what was its right edge."""
    corners = []
    for item, row in zip(items, rows, strict=True):
        left, top, right, _ = row.crop_ltrb
        corners.append((int(top), int(item.bucket[0] - right if row.flipped else left)))
    return Sizes(
        original=torch.tensor([item.size[::-1] for item in items]),
        crop_top_left=torch.tensor(corners),
        target=torch.tensor([item.bucket[::-1] for item in items]),
    )
