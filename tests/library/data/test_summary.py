"""What the metadata says about the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import load_training_set
from library.data.summary import dataset_metadata

SHAPE = json.loads(
    (Path(__file__).resolve().parents[2] / "facts/metadata/lora_metadata.json").read_text(encoding="utf-8")
)["ss_datasets_shape"]


@pytest.fixture
def config(tmp_path: Path, image: Callable[..., Path]) -> DatasetConfig:
    for name in ("3_cat/1", "3_cat/2", "1_animal/1"):
        image(tmp_path / f"{name}.png", (80, 64))
    (tmp_path / "3_cat/1.caption").write_text("Cat, red ,cat", encoding="utf-8")
    subsets = (
        SubsetSettings(tmp_path / "3_cat", 3, class_tokens="cat", captions=CaptionSettings(keep_tokens=2)),
        SubsetSettings(tmp_path / "1_animal", 1, is_reg=True, class_tokens="animal"),
    )
    sizes = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    return DatasetConfig((DatasetSettings((64, 64), subsets, batch_size=2, **sizes),))  # type: ignore[arg-type]


def test_folders_give_one_entry_for_each_property(config: DatasetConfig) -> None:
    entries = dataset_metadata(load_training_set(config))
    assert json.loads(entries["ss_tag_frequency"]) == {"3_cat": {"cat": 3, "red": 1}, "1_animal": {"animal": 1}}
    assert json.loads(entries["ss_dataset_dirs"]) == {"3_cat": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(entries["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 1}}
    info = json.loads(entries["ss_bucket_info"])
    assert info["buckets"] == {"0": {"resolution": [64, 64], "count": 12}}
    assert info["mean_img_ar_error"] == pytest.approx(0.25)
    assert entries["ss_resolution"] == "(64, 64)"
    assert (entries["ss_enable_bucket"], entries["ss_bucket_no_upscale"]) == ("True", "False")
    assert (entries["ss_min_bucket_reso"], entries["ss_max_bucket_reso"]) == ("32", "128")
    assert (entries["ss_num_train_images"], entries["ss_num_reg_images"]) == ("6", "1")
    assert "ss_datasets" not in entries


def test_without_buckets_there_is_nothing_to_say_about_them(config: DatasetConfig) -> None:
    plain = DatasetConfig((replace(config.datasets[0], enable_bucket=False),))
    entries = dataset_metadata(load_training_set(plain))
    assert (entries["ss_bucket_info"], entries["ss_min_bucket_reso"]) == ("null", "None")


def test_a_dataset_file_gives_a_table_of_the_published_shape(config: DatasetConfig, tmp_path: Path) -> None:
    twice = DatasetConfig(config.datasets * 2, tmp_path / "data.toml")
    entries = dataset_metadata(load_training_set(twice))
    assert "ss_reg_dataset_dirs" not in entries and "ss_resolution" not in entries
    assert set(json.loads(entries["ss_dataset_dirs"])) == {"3_cat", "3_cat (2)"}
    assert json.loads(entries["ss_tag_frequency"])["3_cat"] == {"cat": 3, "red": 1}
    datasets = json.loads(entries["ss_datasets"])
    assert len(datasets) == 2
    expected = {name.split()[0] for name in SHAPE["dataset"]}
    assert set(datasets[0]) == expected
    first, second = datasets[0]["subsets"]
    described = {name.split()[0] for name in SHAPE["subset"]} | {"is_reg"}
    assert set(first) == described
    assert (first["image_dir"], first["img_count"], first["keep_tokens"]) == ("3_cat", 2, 2)
    assert (second["is_reg"], second["class_tokens"]) == (True, "animal")


def test_a_metadata_file_and_pairs_are_told_as_such(tmp_path: Path, image: Callable[..., Path]) -> None:
    for folder in ("in", "a", "c"):
        image(tmp_path / folder / "1.png", (80, 64))
    (tmp_path / "m.json").write_text('{"1": {"caption": "a cat", "tags": "Red, small, red"}}', encoding="utf-8")
    metadata = SubsetSettings(tmp_path / "in", metadata_file=tmp_path / "m.json", color_aug=True)
    pairs = SubsetSettings(tmp_path / "a", class_tokens="cat, big", conditioning_data_dir=tmp_path / "c")
    datasets = tuple(DatasetSettings((64, 64), (subset,)) for subset in (metadata, pairs))
    entries = dataset_metadata(load_training_set(DatasetConfig(datasets, tmp_path / "data.toml")))
    first, second = json.loads(entries["ss_datasets"])
    assert (first["is_dreambooth"], second["is_dreambooth"]) == (False, False)
    (subset,) = first["subsets"]
    assert (subset["metadata_file"], subset["image_dir"], subset["color_aug"]) == ("m.json", "in", True)
    assert "class_tokens" not in subset and "is_reg" not in subset
    assert first["tag_frequency"] == {"m.json": {"red": 2, "small": 1}}
    assert second["tag_frequency"] == {"a": {"cat": 1, "big": 1}}
    assert [subset["image_dir"] for subset in second["subsets"]] == ["a"]
    assert json.loads(entries["ss_dataset_dirs"])["m.json"] == {"n_repeats": 1, "img_count": 1}


def test_images_that_are_held_out_are_not_counted(tmp_path: Path, image: Callable[..., Path]) -> None:
    for number in range(4):
        image(tmp_path / "p" / f"{number}.png", (64, 64))
    subset = SubsetSettings(tmp_path / "p", class_tokens="cat")
    data = load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,), validation_split=0.5),)))
    entries = dataset_metadata(data)
    assert entries["ss_num_train_images"] == "2"
    assert json.loads(entries["ss_tag_frequency"]) == {"p": {"cat": 2}}
