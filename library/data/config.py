"""Which images, captions and buckets the user asked for: dataset file, folders and flags -> one DatasetConfig."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.data.buckets import rounded_limits
from library.data.schema import DatasetTable, Table, one_message, read_dataset_file
from library.flags.dataset import CaptionFlags, DatasetFlags

logger = logging.getLogger(__name__)

Size = tuple[int, int]

IMAGE_EXTENSIONS = frozenset(
    case for name in ("png", "jpg", "jpeg", "webp", "bmp", "avif") for case in (f".{name}", f".{name.upper()}")
)
"""Endings of the images that are used, in lower or upper case but not mixed."""


@dataclass(frozen=True)
class CaptionSettings:
    """What is done to a caption each time it is used."""

    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: str = ","
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0


@dataclass(frozen=True)
class SubsetSettings:
    """One folder of images and how they are used."""

    image_dir: Path
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    extension_chosen: bool = False
    """False when the user left the caption extension to us."""
    captions: CaptionSettings = CaptionSettings()
    flip_aug: bool = False
    random_crop: bool = False
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetSettings:
    """Folders that share a resolution and a batch size."""

    resolution: Size
    """Width and height."""
    subsets: tuple[SubsetSettings, ...]
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    """A multiple of the steps, as max_bucket_reso is, when buckets are on."""
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    resize_interpolation: str | None = None
    """The dataset's own choice, for the record; each subset holds the one that counts."""


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of a run."""

    datasets: tuple[DatasetSettings, ...]
    file: Path | None = None
    """The dataset file, None when the folders came from the command line."""


def read_dataset_config(dataset: DatasetFlags, captions: CaptionFlags, *, bucket_multiple: int) -> DatasetConfig:
    """The datasets that the flags and the dataset file describe, with every default filled in.

    A value comes from the subset, else the dataset, else [general], else the command line. `bucket_multiple` is
    what the model's bucket sides must be multiples of. Raises one ValueError that names all mistakes.
    """
    command_line = _command_line(dataset, captions)
    if dataset.dataset_config is not None:
        _warn_unused(dataset)
        file = Path(dataset.dataset_config)
        tables = read_dataset_file(file)
        layers = [_layers(table, tables.general) for table in tables.datasets]
    else:
        file = None
        layers = [({}, _folder_subsets(dataset))]
    mistakes: list[str] = []
    datasets = []
    for number, (dataset_keys, subsets) in enumerate(layers, 1):
        values: Layers = ChainMap(dataset_keys, command_line)
        place = f"[[datasets]] {number}" if file else "command line"
        mistakes += [f"{place}: {mistake}" for mistake in _size_mistakes(values, bucket_multiple)]
        if not mistakes:
            datasets.append(_dataset_settings(values, subsets))
    if mistakes:
        raise ValueError(one_message(str(file or "dataset settings"), mistakes))
    return DatasetConfig(tuple(datasets), file)


Keys = dict[str, Any]
Layers = ChainMap[str, Any]
"""Keys of the dataset file over flags of the command line."""


def _command_line(dataset: DatasetFlags, captions: CaptionFlags) -> Keys:
    """The flags under the names that the dataset file uses."""
    values = {f.name: getattr(group, f.name) for group in (dataset, captions) for f in fields(group)}
    values["batch_size"] = dataset.train_batch_size
    values["num_repeats"] = dataset.dataset_repeats
    return values


def _given(table: Table) -> Keys:
    return table.model_dump(exclude_none=True, exclude={"subsets"})


def _layers(table: DatasetTable, general: Table | None) -> tuple[Keys, list[Keys]]:
    """Keys of a dataset over those of [general], and the keys of its subsets."""
    above = _given(general) if general else {}
    return {**above, **_given(table)}, [_given(subset) for subset in table.subsets]


def _dataset_settings(values: Layers, subsets: list[Keys]) -> DatasetSettings:
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    if values["enable_bucket"]:
        low, high = rounded_limits(low, high, values["bucket_reso_steps"])
    folders = [_subset_settings(subset, values) for subset in subsets]
    used = tuple(folder for folder in folders if folder.num_repeats >= 1)
    for folder in folders:
        if folder.num_repeats < 1:
            logger.warning("%s is not used, since num_repeats is %d", folder.image_dir, folder.num_repeats)
    return DatasetSettings(
        resolution=values["resolution"],
        subsets=used,
        batch_size=values["batch_size"],
        enable_bucket=values["enable_bucket"],
        min_bucket_reso=low,
        max_bucket_reso=high,
        bucket_reso_steps=values["bucket_reso_steps"],
        bucket_no_upscale=values["bucket_no_upscale"],
        network_multiplier=values.get("network_multiplier", 1.0),
        resize_interpolation=values["resize_interpolation"],
    )


def _subset_settings(subset: Keys, above: Layers) -> SubsetSettings:
    values = above.new_child(subset)
    extension = values["caption_extension"]
    in_file = any("caption_extension" in layer for layer in values.maps[:-1])
    return SubsetSettings(
        image_dir=Path(values["image_dir"]),
        num_repeats=values["num_repeats"],
        is_reg=values.get("is_reg", False),
        class_tokens=values.get("class_tokens"),
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        extension_chosen=in_file or extension != CaptionFlags().caption_extension,
        captions=CaptionSettings(**{f.name: values[f.name] for f in fields(CaptionSettings)}),
        flip_aug=values["flip_aug"],
        random_crop=values["random_crop"],
        resize_interpolation=values["resize_interpolation"],
        custom_attributes=values.get("custom_attributes", {}),
    )


def _size_mistakes(values: Mapping[str, Any], bucket_multiple: int) -> list[str]:
    """What is wrong with the resolution and the buckets of one dataset."""
    if values["resolution"] is None:
        return ["resolution is missing; give --resolution 512, or write resolution = 512 in the dataset file"]
    if not values["enable_bucket"]:
        return []
    step = values["bucket_reso_steps"]
    if step % bucket_multiple:
        return [f"bucket_reso_steps = {step}; expected a multiple of {bucket_multiple} for this model"]
    width, height = values["resolution"]
    low, high = rounded_limits(values["min_bucket_reso"], values["max_bucket_reso"], step)
    mistakes = []
    if low > min(width, height):
        mistakes.append(f"min_bucket_reso = {low} is above the resolution {width}x{height}; expected less or equal")
    if high < max(width, height):
        mistakes.append(f"max_bucket_reso = {high} is below the resolution {width}x{height}; expected more or equal")
    return mistakes


def _warn_unused(dataset: DatasetFlags) -> None:
    for name in ("train_data_dir", "reg_data_dir"):
        if getattr(dataset, name) is not None:
            logger.warning("--%s is not used, because --dataset_config is given", name)


def _folder_subsets(dataset: DatasetFlags) -> list[Keys]:
    """Subsets from folder names, training images first."""
    if dataset.train_data_dir is None:
        raise ValueError("no images are given; use --dataset_config FILE.toml, or --train_data_dir FOLDER")
    subsets = _named_folders(Path(dataset.train_data_dir), "--train_data_dir", is_reg=False)
    if dataset.reg_data_dir is not None:
        subsets += _named_folders(Path(dataset.reg_data_dir), "--reg_data_dir", is_reg=True)
    return subsets


def _named_folders(parent: Path, flag: str, is_reg: bool) -> list[Keys]:
    """The folders `<repeats>_<class tokens>` in `parent`, sorted by name."""
    if not parent.is_dir():
        raise ValueError(f"{flag} {parent}: there is no such folder")
    loose = sum(path.suffix in IMAGE_EXTENSIONS for path in parent.iterdir())
    if loose:
        logger.warning("%s: %d images are not used, because they lie beside the numbered folders", parent, loose)
    found = []
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        repeats, _, tokens = folder.name.partition("_")
        try:
            count = int(repeats)
        except ValueError:
            count = 0
        if count < 1:
            logger.warning("%s is not used: its name does not begin with a number of repeats, as 10_name does", folder)
            continue
        found.append({"image_dir": str(folder), "num_repeats": count, "class_tokens": tokens, "is_reg": is_reg})
    if not found:
        raise ValueError(
            f"{flag} {parent}: it has no folder whose name begins with a number of repeats; "
            f"put the images in a folder such as {parent / '10_name'}"
        )
    return found
