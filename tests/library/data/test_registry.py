"""Folders and dataset files against recorded cases: which images, captions, repeats and buckets come of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data.config import read_dataset_config
from library.data.dataset import ImageSet, TrainingSet, load_training_set
from library.data.kinds import Kind
from library.data.summary import tag_frequency
from library.flags.dataset import CaptionFlags, DatasetFlags

CASES = {
    case["case"]: case
    for case in json.loads(
        (Path(__file__).resolve().parents[2] / "facts/dataset/registry.json").read_text(encoding="utf-8")
    )["cases"]
}

MENDED = {
    "toml type: int for float multiplier": "Data, int where a float is declared: a whole number is a number",
    "toml type: int validation_split": "Data, int where a float is declared",
    "toml type: face range ints": "Data, int where a float is declared",
    "size from cache file name": "Data, image size cache: sizes come from the image, not from another file's name",
    "metadata wildcard": "Data, wildcards and an empty caption with tags: the tags are kept",
    "validation split 3 images 0.5": "Data, validation split: disjoint",
    "validation split 7 images 0.5": "Data, validation split: disjoint",
    "validation split 4 images 1.0": "no training image at all is a mistake",
    "validation split without seed": "Data, validation split: disjoint, with the seed of the training",
    "validation split with metadata json": "Data, validation split: every dataset kind",
    "validation split with cache_info": "Data, validation split: captions keep their images",
    "validation split with masks": "Data, validation split: every dataset kind",
}
"""Cases where the recorded program is not followed, with the subject of the rule."""

FOLLOWED = [name for name in CASES if name not in MENDED]
KINDS = {
    Kind.FOLDERS: "DreamBoothDataset",
    Kind.METADATA: "FineTuningDataset",
    Kind.CONDITIONING: "ControlNetDataset",
}


def load(case: dict[str, Any], root: Path, image: Callable[..., Path]) -> TrainingSet:
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
    config = read_dataset_config(
        DatasetFlags(**values), captions, bucket_multiple=8, masked_loss="--masked_loss" in case.get("argv", [])
    )
    return load_training_set(config, allow_uncaptioned=True)


def sets(training_set: TrainingSet) -> dict[str, list[ImageSet]]:
    validation = training_set.validation
    return {"train": training_set.datasets} | ({"validation": validation.datasets} if validation else {})


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
        | ({"cond": item.conditioning_path.relative_to(root).as_posix()} if item.conditioning_path else {})
        for item in sorted(dataset.items, key=lambda item: item.path.relative_to(root).as_posix())
    ]
    counts = {f"{bucket.size[0]}x{bucket.size[1]}": bucket.count for bucket in dataset.buckets}
    return {
        "kind": KINDS[dataset.settings.subsets[0].kind],
        "images": images,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "batch_size": dataset.settings.batch_size,
        "batches": dataset.num_batches,
        "bucket_counts": counts if dataset.settings.enable_bucket else None,
        "tag_frequency": tag_frequency(dataset),
    }


def recorded(name: str) -> dict[str, list[dict[str, Any]]]:
    """What was recorded, without the validation sets that hold nothing."""
    return {role: found for role, found in CASES[name]["result"].items() if any(dataset["images"] for dataset in found)}


def without_empty(described_sets: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Folders without tags stand in some recorded tables and not in others."""
    return {
        role: [d | {"tag_frequency": {n: t for n, t in d["tag_frequency"].items() if t}} for d in found]
        for role, found in described_sets.items()
    }


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_recorded_images_are_found(name: str, tmp_path: Path, image: Callable[..., Path]) -> None:
    expected = CASES[name]["result"]
    if "rejected" in expected:
        with pytest.raises(ValueError):
            load(CASES[name], tmp_path, image)
        return
    found = sets(load(CASES[name], tmp_path, image))
    described_sets = {role: [described(dataset, tmp_path) for dataset in datasets] for role, datasets in found.items()}
    if "validation" in expected:
        assert without_empty(described_sets) == without_empty(recorded(name))
    else:
        assert described_sets == expected


def test_every_mended_case_is_asserted_below() -> None:
    assert MENDED.keys() <= CASES.keys() and len(FOLLOWED) == 34


def test_a_whole_number_may_stand_for_a_number(tmp_path: Path, image: Callable[..., Path]) -> None:
    assert len(load(CASES["toml type: int validation_split"], tmp_path, image).datasets) == 1
    (dataset,) = load(CASES["toml type: int for float multiplier"], tmp_path, image).datasets
    assert dataset.settings.network_multiplier == 1.0
    (dataset,) = load(CASES["toml type: face range ints"], tmp_path, image).datasets
    assert dataset.settings.subsets[0].face_crop_aug_range == (1.0, 2.0)


def test_sizes_come_from_the_image_itself(tmp_path: Path, image: Callable[..., Path]) -> None:
    (dataset,) = load(CASES["size from cache file name"], tmp_path, image).datasets
    assert [item.size for item in dataset.items] == [(64, 64), (64, 64)]


def test_tags_without_a_caption_are_kept_with_wildcards(tmp_path: Path, image: Callable[..., Path]) -> None:
    (dataset,) = load(CASES["metadata wildcard"], tmp_path, image).datasets
    assert [item.caption for item in dataset.items] == ["l1,x,y\nl2,x,y", "only tags"]
    assert tag_frequency(dataset) == CASES["metadata wildcard"]["result"]["train"][0]["tag_frequency"]


@pytest.mark.parametrize("name", ["validation split 3 images 0.5", "validation split 7 images 0.5"])
def test_the_recorded_training_images_are_not_held_out_too(
    name: str, tmp_path: Path, image: Callable[..., Path]
) -> None:
    data = load(CASES[name], tmp_path, image)
    train, validation = names(data)
    assert train == [Path(row["image"]).name for row in CASES[name]["result"]["train"][0]["images"]]
    both = [Path(row["image"]).name for row in CASES[name]["result"]["validation"][0]["images"]]
    assert validation == [held_out for held_out in both if held_out not in train]
    assert data.validation is not None and {item.num_repeats for item in data.validation.datasets[0].items} == {1}


def test_a_split_that_leaves_nothing_to_train_on_is_a_mistake(tmp_path: Path, image: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"no training images were found in: .*validation_split holds all of them out"):
        load(CASES["validation split 4 images 1.0"], tmp_path, image)


@pytest.mark.parametrize(
    ("name", "num_train", "num_validation"),
    [
        ("validation split without seed", 5, 5),
        ("validation split with metadata json", 1, 1),
        ("validation split with cache_info", 3, 3),
        ("validation split with masks", 2, 2),
    ],
)
def test_every_kind_is_split_and_the_parts_are_disjoint(
    name: str, num_train: int, num_validation: int, tmp_path: Path, image: Callable[..., Path]
) -> None:
    for _ in range(2):  # the second time with metadata_cache.json, where there is one
        data = load(CASES[name], tmp_path, image)
        train, validation = names(data)
        assert (len(train), len(validation)) == (num_train, num_validation)
        assert not set(train) & set(validation)
        assert data.validation is not None
        for item in data.datasets[0].items + data.validation.datasets[0].items:
            assert item.conditioning_path is None or item.conditioning_path.stem == item.path.stem
            if name.endswith("cache_info"):
                assert item.caption == f"cap{item.path.stem}"


def names(data: TrainingSet) -> tuple[list[str], list[str]]:
    """The images that are trained on, and those that are held out."""
    assert data.validation is not None
    train, validation = (
        sorted(i.path.name for d in part.datasets for i in d.items) for part in (data, data.validation)
    )
    return train, validation
