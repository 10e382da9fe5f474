"""Which images, captions and buckets the user asked for: dataset file, folders and flags -> one DatasetConfig."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.data.buckets import rounded_limits
from library.data.folders import Keys, named_subsets
from library.data.kinds import Kind, kind_of
from library.data.schema import DatasetFile, given, one_message, read_dataset_file
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.monitor import ValidationFlags

logger = logging.getLogger(__name__)

Size = tuple[int, int]


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
    """One folder of images, or one metadata file, and how its images are used."""

    image_dir: Path | None = None
    """None when the metadata file names every image with its whole path."""
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
    metadata_file: Path | None = None
    """Captions, tags and sizes in one .json or .jsonl file."""
    conditioning_data_dir: Path | None = None
    """A folder with a second image for each image, of the same stem."""
    alpha_mask: bool = False
    """Weigh the loss by the alpha channel."""
    cache_info: bool = False
    """Remember captions and sizes in the folder."""
    color_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    """Least and most zoom on the face that the file name gives; None when crops take no notice of faces."""

    @property
    def source(self) -> Path:
        """The metadata file, else the folder: what messages and statistics call the subset."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source

    @property
    def keeps_prior(self) -> bool:
        """Whether the target of its images is the untrained model's answer."""
        return bool(self.custom_attributes.get("diff_output_preservation"))

    @property
    def kind(self) -> Kind:
        """Where captions come from, and whether a second image belongs to each."""
        return kind_of({"metadata_file": self.metadata_file, "conditioning_data_dir": self.conditioning_data_dir})


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
    validation_split: float = 0.0
    """The share of each subset's images that is held out; regularisation images never are."""
    validation_seed: int = 0
    """Decides which images are held out."""
    masked_loss: bool = False
    """Conditioning images are masks: their red channel weighs the loss."""


@dataclass(frozen=True)
class DatasetConfig:
    """All datasets of a run."""

    datasets: tuple[DatasetSettings, ...]
    file: Path | None = None
    """The dataset file, None when the folders came from the command line."""


def read_dataset_config(
    dataset: DatasetFlags,
    captions: CaptionFlags,
    validation: ValidationFlags | None = None,
    *,
    bucket_multiple: int,
    masked_loss: bool = False,
    control: bool = False,
    seed: int = 0,
) -> DatasetConfig:
    """The datasets that the flags and the dataset file describe, with every default filled in.

    A value comes from the subset, else the dataset, else [general], else the command line. `bucket_multiple` is
    what the model's bucket sides must be multiples of. Conditioning images are masks with `masked_loss`, and what
    is trained with `control`; without either nobody would look at them. `seed` is that of the training, which
    decides what is held out unless validation_seed does. Raises one ValueError that names all mistakes.
    """
    command_line = _command_line(dataset, captions, validation or ValidationFlags())
    if dataset.dataset_config is not None:
        _warn_unused(dataset)
        file = Path(dataset.dataset_config)
        layers = _layers(read_dataset_file(file, conditioning=masked_loss or control))
    else:
        file = None
        layers = [("command line", {}, named_subsets(dataset))]
        if dataset.conditioning_data_dir is not None and not (masked_loss or control):
            raise ValueError("--conditioning_data_dir has no effect without --masked_loss, which takes them as masks")
    mistakes: list[str] = []
    datasets = []
    for place, dataset_keys, subsets in layers:
        values: Layers = ChainMap(dataset_keys, command_line)
        found = _size_mistakes(values, bucket_multiple) + _use_mistakes(values, subsets, control)
        mistakes += [f"{place}: {mistake}" for mistake in found]
        if not mistakes:
            datasets.append(_dataset_settings(values, subsets, masked_loss, seed))
    if mistakes:
        raise ValueError(one_message(str(file or "dataset settings"), mistakes))
    return DatasetConfig(tuple(datasets), file)


Layers = ChainMap[str, Any]
"""Keys of the dataset file over flags of the command line."""


def _command_line(dataset: DatasetFlags, captions: CaptionFlags, validation: ValidationFlags) -> Keys:
    """The flags under the names that the dataset file uses."""
    groups = (dataset, captions, validation)
    values = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    values["batch_size"] = dataset.train_batch_size
    values["num_repeats"] = dataset.dataset_repeats
    return values


def _layers(tables: DatasetFile) -> list[tuple[str, Keys, list[Keys]]]:
    """The place of each dataset, its keys over those of [general], and the keys of its subsets."""
    above = given(tables.general) if tables.general else {}
    layers = []
    for place, table in tables.all_datasets():
        keys = {**above, **given(table)}
        if table is tables.validation:
            keys["validation_split"] = 1.0
        layers.append((place, keys, [given(subset) for subset in table.subsets]))
    return layers


def _dataset_settings(values: Layers, subsets: list[Keys], masked_loss: bool, seed: int) -> DatasetSettings:
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    if values["enable_bucket"]:
        low, high = rounded_limits(low, high, values["bucket_reso_steps"])
    folders = [_subset_settings(subset, values) for subset in subsets]
    used = tuple(folder for folder in folders if folder.num_repeats >= 1)
    for folder in folders:
        if folder.num_repeats < 1:
            logger.warning("%s is not used, since num_repeats is %d", folder.source, folder.num_repeats)
    chosen_seed = values["validation_seed"]
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
        validation_split=values["validation_split"],
        validation_seed=seed if chosen_seed is None else chosen_seed,
        masked_loss=masked_loss,
    )


def _subset_settings(subset: Keys, above: Layers) -> SubsetSettings:
    values = above.new_child(subset)
    extension = values["caption_extension"]
    in_file = any("caption_extension" in layer for layer in values.maps[:-1])
    kind = kind_of(subset)
    # Only the subset itself names paths: a flag of the same name is for runs without a dataset file.
    paths = {key: subset.get(key) for key in ("image_dir", "metadata_file", "conditioning_data_dir")}
    return SubsetSettings(
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
        alpha_mask=values["alpha_mask"] and kind is not Kind.CONDITIONING,
        cache_info=values["cache_info"] and kind is not Kind.METADATA,
        color_aug=values["color_aug"],
        face_crop_aug_range=None if values["enable_bucket"] else values["face_crop_aug_range"],
        **{key: None if value is None else Path(value) for key, value in paths.items()},
    )


def _use_mistakes(values: Layers, subsets: list[Keys], control: bool) -> list[str]:
    """What does not go together in one dataset, wherever it was said."""
    mistakes = []
    for number, subset in enumerate(subsets, 1):
        if kind_of(subset) is Kind.CONDITIONING:
            changing = [key for key in ("random_crop", "face_crop_aug_range") if values.new_child(subset)[key]]
            mistakes += [
                f"subset {number}: {key} cannot be used with conditioning_data_dir: both images are cut in the middle"
                for key in changing
            ]
        elif control:
            mistakes.append(f"subset {number}: conditioning_data_dir is missing; this script trains on image pairs")
    return mistakes


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
    for name in ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"):
        if getattr(dataset, name) is not None:
            logger.warning("--%s is not used, because --dataset_config is given", name)
