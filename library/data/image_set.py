"""Which images are trained at which size: the buckets of one dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from library.data.buckets import Buckets
from library.data.config import DatasetSettings
from library.data.items import ImageItem
from library.data.scan import ScannedDataset
from library.data.text_cache_files import TextCache
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


def log_buckets(name: str, dataset: ImageSet) -> None:
    """Say what is in which bucket, and warn of those that are smaller than a batch."""
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
