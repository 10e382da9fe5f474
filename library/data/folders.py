"""Which images the command line names when there is no dataset file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from library.data.image_file import image_endings
from library.flags.dataset import DatasetFlags

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = image_endings()
"""Endings of the images that are used, in lower or upper case but not mixed."""

Keys = dict[str, Any]


def named_subsets(dataset: DatasetFlags) -> list[Keys]:
    """The keys of every subset that the flags describe, training images first.

    `--in_json` and `--conditioning_data_dir` take the images that lie in --train_data_dir itself; else the folders in
    it are named `<repeats>_<class tokens>`. ValueError names the flags that do not go together.
    """
    for flag in ("in_json", "conditioning_data_dir"):
        if getattr(dataset, flag) is not None and dataset.reg_data_dir is not None:
            raise ValueError(f"--reg_data_dir cannot be used with --{flag}; leave one of them out")
    if dataset.in_json is not None:
        if dataset.conditioning_data_dir is not None:
            raise ValueError("--in_json and --conditioning_data_dir describe different kinds of datasets; keep one")
        return [_without_none({"metadata_file": dataset.in_json, "image_dir": dataset.train_data_dir})]
    if dataset.train_data_dir is None:
        raise ValueError("no images are given; use --dataset_config FILE.toml, or --train_data_dir FOLDER")
    if dataset.conditioning_data_dir is not None:
        return [{"image_dir": dataset.train_data_dir, "conditioning_data_dir": dataset.conditioning_data_dir}]
    subsets = _numbered_folders(Path(dataset.train_data_dir), "--train_data_dir", is_reg=False)
    if dataset.reg_data_dir is not None:
        subsets += _numbered_folders(Path(dataset.reg_data_dir), "--reg_data_dir", is_reg=True)
    return subsets


def _numbered_folders(parent: Path, flag: str, is_reg: bool) -> list[Keys]:
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


def _without_none(keys: Keys) -> Keys:
    return {key: value for key, value in keys.items() if value is not None}
