"""How the images of a metadata file get their buckets and latents before a training, and the file learns of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from library.data.config import DatasetSettings, read_dataset_config
from library.data.dataset import TrainingSet
from library.data.image_set import ImageSet, log_buckets, put_into_buckets
from library.data.items import ImageItem
from library.data.metadata_entries import Entries, image_keys, read_metadata, write_metadata
from library.data.picture_files import for_each
from library.data.pixels import image_size
from library.data.scan import ScannedDataset
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.accelerator import make_accelerator
from library.train.caches import fill_all_latents

logger = logging.getLogger(__name__)


def prepare_buckets(
    settings: Settings, arch: Architecture, in_json: Path, out_json: Path, *, full_path: bool, recursive: bool
) -> None:
    """Encode the images of --train_data_dir beside themselves, and write their sizes in training into `out_json`.

    Every entry of `in_json` is kept, an image without one gets one, and `train_resolution` becomes the width and
    height of its bucket. ValueError says what is wrong with the settings, the file or the images; then `out_json`
    is left as it was.
    """
    flags = settings[DatasetFlags]
    assert flags.train_data_dir is not None
    entries = read_metadata(in_json)
    keys = image_keys(Path(flags.train_data_dir), full_path=full_path, recursive=recursive)
    _mention_strangers(entries, keys, in_json)
    config = read_dataset_config(flags, CaptionFlags(), bucket_multiple=arch.latents.stride)
    images = _in_buckets(config.datasets[0], keys, entries)
    log_buckets(str(flags.train_data_dir), images)
    accelerator = make_accelerator(settings)
    fill_all_latents(settings, arch, TrainingSet([images], config=config), accelerator)
    if accelerator.is_main_process:
        for key, item in zip(keys, images.items, strict=True):
            entries.setdefault(key, {})["train_resolution"] = list(item.bucket)
        write_metadata(out_json, entries)
        logger.info("%s: %d images have their latents beside them", out_json, len(keys))
    accelerator.end_training()


def _mention_strangers(entries: Entries, keys: Mapping[str, Path], file: Path) -> None:
    """Entries without an image, and images without an entry: often a sign of --full_path given once only."""
    for what, names in (
        ("entries of {file} belong to no image", [key for key in entries if key not in keys]),
        ("images have no entry in {file} and get one", [key for key in keys if key not in entries]),
    ):
        if names:
            logger.warning("%d %s, such as %s", len(names), what.format(file=file), names[0])


def _in_buckets(settings: DatasetSettings, keys: Mapping[str, Path], entries: Entries) -> ImageSet:
    """The images of `keys`, in that order, in the buckets of `settings`."""
    items: list[ImageItem] = []

    def measure(path: Path, key: str) -> None:
        caption = str(entries.get(key, {}).get("caption") or "")
        items.append(ImageItem(path, caption, 1, False, 0, image_size(path)))

    names = {path: key for key, path in keys.items()}
    for_each(list(names), lambda path: measure(path, names[path]))
    captions = [[item.caption for item in items]]
    return put_into_buckets(settings, ScannedDataset(items, captions, len(items), 0))
