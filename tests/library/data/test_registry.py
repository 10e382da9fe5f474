"""Folders and dataset files against recorded cases: which images, captions, repeats and buckets come of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data.config import read_dataset_config
from library.data.dataset import ImageSet, load_training_set
from library.data.summary import tag_frequency
from library.flags.dataset import CaptionFlags, DatasetFlags

CASES = {
    case["case"]: case
    for case in json.loads(
        (Path(__file__).resolve().parents[2] / "facts/dataset/registry.json").read_text(encoding="utf-8")
    )["cases"]
}

NOT_AVAILABLE_YET = [
    name for name in CASES if name.startswith(("metadata json", "metadata wildcard", "mask pair", "validation split"))
] + ["mask key without masked_loss", "mixed subsets", "metadata by command line"]
"""Captions in one file, masks, held-out images."""

MENDED = {
    "toml type: int for float multiplier": "a whole number is a number",
    "toml type: int validation_split": "the same",
    "size from cache file name": "sizes come from the image itself, never from the name of another file",
}
"""Cases where the recorded program is not followed."""

READABLE = [name for name in CASES if name not in NOT_AVAILABLE_YET and name not in MENDED]


def load(case: dict[str, Any], root: Path, image: Callable[..., Path]) -> list[ImageSet]:
    for name, content in case["files"].items():
        path = root / name
        if isinstance(content, list):
            image(path, tuple(content))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("@ROOT@", root.as_posix()), encoding="utf-8", newline="")
    words = [word.replace("@ROOT@", root.as_posix()) for word in case.get("argv", []) if word != "--masked_loss"]
    values: dict[str, Any] = {flag.removeprefix("--"): word for flag, word in zip(words[::2], words[1::2], strict=True)}
    values |= {name: int(values[name]) for name in ("train_batch_size", "dataset_repeats") if name in values}
    if "resolution" in values:
        sides = [int(side) for side in values["resolution"].split(",")]
        values["resolution"] = (sides[0], sides[-1])
    captions = CaptionFlags(**{"caption_extension": values.pop("caption_extension", ".caption")})
    if "toml" in case:
        values["dataset_config"] = root / "dataset.toml"
        values["dataset_config"].write_text(case["toml"].replace("@ROOT@", root.as_posix()), encoding="utf-8")
    config = read_dataset_config(DatasetFlags(**values), captions, bucket_multiple=8)
    return load_training_set(config, allow_uncaptioned=True).datasets


def described(dataset: ImageSet, root: Path) -> dict[str, Any]:
    images = [
        {
            "image": item.path.relative_to(root).as_posix(),
            "repeats": item.num_repeats,
            "caption": item.caption,
            "reg": item.is_reg,
            "size": list(item.size),
            "bucket": list(item.bucket),
        }
        for item in sorted(dataset.items, key=lambda item: item.path.relative_to(root).as_posix())
    ]
    counts = {f"{bucket.size[0]}x{bucket.size[1]}": bucket.count for bucket in dataset.buckets}
    return {
        "kind": "DreamBoothDataset",
        "images": images,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "batch_size": dataset.settings.batch_size,
        "batches": dataset.num_batches,
        "bucket_counts": counts if dataset.settings.enable_bucket else None,
        "tag_frequency": tag_frequency(dataset),
    }


@pytest.mark.parametrize("name", READABLE)
def test_the_recorded_images_are_found(name: str, tmp_path: Path, image: Callable[..., Path]) -> None:
    expected = CASES[name]["result"]
    if "rejected" in expected:
        with pytest.raises(ValueError):
            load(CASES[name], tmp_path, image)
    else:
        found = [described(dataset, tmp_path) for dataset in load(CASES[name], tmp_path, image)]
        assert found == expected["train"]


@pytest.mark.parametrize("name", [name for name in NOT_AVAILABLE_YET if "toml" in CASES.get(name, {})])
def test_what_is_not_offered_yet_is_refused(name: str, tmp_path: Path, image: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="not available yet"):
        load(CASES[name], tmp_path, image)


def test_a_whole_number_may_stand_for_a_number(tmp_path: Path, image: Callable[..., Path]) -> None:
    assert len(load(CASES["toml type: int validation_split"], tmp_path, image)) == 1
    (dataset,) = load(CASES["toml type: int for float multiplier"], tmp_path, image)
    assert dataset.settings.network_multiplier == 1.0


def test_sizes_come_from_the_image_itself(tmp_path: Path, image: Callable[..., Path]) -> None:
    (dataset,) = load(CASES["size from cache file name"], tmp_path, image)
    assert [item.size for item in dataset.items] == [(64, 64), (64, 64)]
