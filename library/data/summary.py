"""What the metadata of a trained file says about its data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from library.data.config import SubsetSettings
from library.data.dataset import ImageSet, TrainingSet
from library.data.kinds import Kind

SUBSET_KEYS = ("num_repeats", "color_aug", "flip_aug", "random_crop", "resize_interpolation")
FOLDER_KEYS = ("class_tokens", "is_reg")
CAPTION_KEYS = (
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
)


def dataset_metadata(training_set: TrainingSet) -> dict[str, str]:
    """The ss_* entries about the data, as text: JSON where the entry holds a table, else Python's `str`.

    A dataset file gives `ss_datasets`; folders of the command line give one entry for each property.
    """
    tables: dict[str, Any] = {
        "ss_tag_frequency": _all_tag_frequencies(training_set),
        "ss_dataset_dirs": _folders(training_set, is_reg=False),
    }
    values: dict[str, Any] = {
        "ss_num_train_images": training_set.num_train_images,
        "ss_num_reg_images": training_set.num_reg_images,
    }
    if training_set.config.file is not None:
        tables["ss_datasets"] = [_dataset(dataset) for dataset in training_set.datasets]
    else:
        (dataset,) = training_set.datasets
        low, high = _bucket_limits(dataset)
        tables["ss_reg_dataset_dirs"] = _folders(training_set, is_reg=True)
        tables["ss_bucket_info"] = _bucket_info(dataset)
        values |= {
            "ss_resolution": dataset.settings.resolution,
            "ss_enable_bucket": dataset.settings.enable_bucket,
            "ss_bucket_no_upscale": dataset.settings.bucket_no_upscale,
            "ss_min_bucket_reso": low,
            "ss_max_bucket_reso": high,
        }
    return {key: json.dumps(table) for key, table in tables.items()} | {key: str(v) for key, v in values.items()}


def tag_frequency(dataset: ImageSet) -> dict[str, dict[str, int]]:
    """Folder name -> lower-case tag -> number of images, repeats not counted."""
    frequencies: dict[str, Counter[str]] = {}
    for subset, captions in _used_subsets(dataset):
        tags = frequencies.setdefault(subset.source.name, Counter())
        for caption in captions:
            tags.update(tag.strip().lower() for tag in caption.split(",") if tag.strip())
    return {name: dict(tags) for name, tags in frequencies.items()}


def _used_subsets(dataset: ImageSet) -> Iterator[tuple[SubsetSettings, list[str]]]:
    """The subsets that hold images, with the captions of these."""
    for subset, captions in zip(dataset.settings.subsets, dataset.captions, strict=True):
        if captions:
            yield subset, captions


def _all_tag_frequencies(training_set: TrainingSet) -> dict[str, dict[str, int]]:
    """Of all datasets; of folders with one name the first counts."""
    merged: dict[str, dict[str, int]] = {}
    for dataset in training_set.datasets:
        merged = tag_frequency(dataset) | merged
    return merged


def _folders(training_set: TrainingSet, is_reg: bool) -> dict[str, dict[str, int]]:
    """Folder name -> repeats and number of images; a name that comes again gets a number."""
    folders: dict[str, dict[str, int]] = {}
    for dataset in training_set.datasets:
        for subset, captions in _used_subsets(dataset):
            if subset.is_reg == is_reg:
                name = _unused_name(subset.source.name, folders)
                folders[name] = {"n_repeats": subset.num_repeats, "img_count": len(captions)}
    return folders


def _unused_name(name: str, taken: dict[str, Any]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def _dataset(dataset: ImageSet) -> dict[str, Any]:
    settings = dataset.settings
    low, high = _bucket_limits(dataset)
    return {
        "is_dreambooth": {subset.kind for subset in settings.subsets} <= {Kind.FOLDERS},
        "batch_size_per_device": settings.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": settings.resolution,
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": low,
        "max_bucket_reso": high,
        "tag_frequency": tag_frequency(dataset),
        "bucket_info": _bucket_info(dataset),
        "resize_interpolation": settings.resize_interpolation,
        "subsets": [_subset(subset, len(captions)) for subset, captions in _used_subsets(dataset)],
    }


def _subset(subset: SubsetSettings, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {"img_count": count}
    values |= {key: getattr(subset, key) for key in SUBSET_KEYS}
    values |= {key: getattr(subset.captions, key) for key in CAPTION_KEYS}
    if subset.image_dir is not None:
        values["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return values | {"metadata_file": subset.metadata_file.name}
    return values | {key: getattr(subset, key) for key in FOLDER_KEYS}


def _bucket_limits(dataset: ImageSet) -> tuple[int | None, int | None]:
    settings = dataset.settings
    return (settings.min_bucket_reso, settings.max_bucket_reso) if settings.enable_bucket else (None, None)


def _bucket_info(dataset: ImageSet) -> dict[str, Any] | None:
    if not dataset.settings.enable_bucket:
        return None
    buckets = {i: {"resolution": bucket.size, "count": bucket.count} for i, bucket in enumerate(dataset.buckets)}
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_aspect_error}
