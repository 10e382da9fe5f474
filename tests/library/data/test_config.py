"""Precedence, and what is said about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.config import DatasetConfig, read_dataset_config
from library.data.schema import DatasetTable, GeneralTable, SubsetTable
from library.flags.dataset import CaptionFlags, DatasetFlags

FLAGS: dict[str, Any] = {"resolution": (64, 64)}


def read(tmp_path: Path, text: str, name: str = "data.toml", captions: CaptionFlags | None = None) -> DatasetConfig:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    flags = DatasetFlags(dataset_config=file, train_batch_size=7, **FLAGS)
    return read_dataset_config(flags, captions or CaptionFlags(), bucket_multiple=64)


def complaint(tmp_path: Path, text: str, name: str = "data.toml") -> str:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, name)
    return str(caught.value)


def test_subset_beats_dataset_beats_general_beats_command_line(tmp_path: Path) -> None:
    text = """
        [general]
        keep_tokens = 1
        caption_prefix = "general"
        resolution = 512
        [[datasets]]
        caption_prefix = "dataset"
        [[datasets.subsets]]
        image_dir = "a"
        caption_prefix = "subset"
        [[datasets.subsets]]
        image_dir = "b"
        [[datasets]]
        resolution = [512, 768]
        [[datasets.subsets]]
        image_dir = "c"
    """
    flags = CaptionFlags(caption_prefix="flag", caption_suffix="flag", keep_tokens=9)
    first, second = read(tmp_path, text, captions=flags).datasets
    assert [subset.captions.caption_prefix for subset in first.subsets] == ["subset", "dataset"]
    assert second.subsets[0].captions.caption_prefix == "general"
    assert {subset.captions.caption_suffix for subset in first.subsets + second.subsets} == {"flag"}
    assert {subset.captions.keep_tokens for subset in first.subsets + second.subsets} == {1}
    assert (first.resolution, second.resolution, first.batch_size) == ((512, 512), (512, 768), 7)


def test_a_json_file_says_the_same_and_null_says_nothing(tmp_path: Path) -> None:
    text = '{"datasets": [{"batch_size": null, "subsets": [{"image_dir": "a", "flip_aug": true}]}]}'
    (dataset,) = read(tmp_path, text, "data.json").datasets
    assert dataset.subsets[0].flip_aug and dataset.batch_size == 7


def test_all_mistakes_are_named_with_table_key_value_and_cure(tmp_path: Path) -> None:
    message = complaint(
        tmp_path,
        """
        [general]
        image_dir = "x"
        [[datasets]]
        resolutoin = 512
        batch_size = "two"
        prior_loss_weight = 1.0
        [[datasets.subsets]]
        image_dir = "a"
        shuffle_caption = "False"
        num_repeats = 1.5
        resolution = 512
        resize_interpolation = "sharp"
        [[datasets.subsets]]
        image_dir = "b"
        caption_dropout_rate = 1.5
        """,
    )
    assert "data.toml: 9 mistakes" in message
    for line in (
        '[general]: unknown key image_dir = "x"; it belongs in [[datasets.subsets]]',
        "[[datasets]] 1: unknown key resolutoin = 512; did you mean resolution?",
        '[[datasets]] 1: batch_size = "two"; expected a valid integer',
        "[[datasets]] 1: unknown key prior_loss_weight = 1.0; it is a flag of the command line, --prior_loss_weight",
        '[[datasets.subsets]] 1 of [[datasets]] 1: shuffle_caption = "False"; expected a valid boolean',
        "[[datasets.subsets]] 1 of [[datasets]] 1: num_repeats = 1.5; expected a valid integer",
        "subsets]] 1 of [[datasets]] 1: unknown key resolution = 512; it belongs in [general] or [[datasets]]",
        "[[datasets.subsets]] 2 of [[datasets]] 1: caption_dropout_rate = 1.5; expected less than or equal to 1",
    ):
        assert line in message
    assert "resize_interpolation = \"sharp\"; expected 'lanczos'" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_mask", "true"),
        ("cache_info", "true"),
        ("color_aug", "true"),
        ("conditioning_data_dir", '"c"'),
        ("face_crop_aug_range", "[1.0, 2.0]"),
        ("metadata_file", '"m.json"'),
    ],
)
def test_keys_of_later_work_are_refused_by_name(tmp_path: Path, key: str, value: str) -> None:
    message = complaint(tmp_path, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n{key} = {value}')
    assert f"[[datasets.subsets]] 1 of [[datasets]] 1: {key} = {value}".split(" = ")[0] in message
    assert "is not available yet" in message


def test_keys_of_later_work_that_ask_for_nothing_are_accepted(tmp_path: Path) -> None:
    text = '[[datasets]]\nvalidation_split = 0.0\n[[datasets.subsets]]\nimage_dir = "a"\ncolor_aug = false'
    assert len(read(tmp_path, text).datasets) == 1


def test_the_other_name_of_resize_interpolation_is_read(tmp_path: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\ninterpolation_type = "box"'
    assert read(tmp_path, text).datasets[0].subsets[0].resize_interpolation == "box"


def test_a_subset_without_folder_is_named(tmp_path: Path) -> None:
    assert "[[datasets.subsets]] 1 of [[datasets]] 1: image_dir is missing" in complaint(
        tmp_path, "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2"
    )


def test_a_dataset_without_subsets_is_named(tmp_path: Path) -> None:
    assert "[[datasets]] 1: subsets is missing" in complaint(tmp_path, "[[datasets]]\nresolution = 64")


def test_single_brackets_are_explained(tmp_path: Path) -> None:
    assert "write [[datasets]] in double brackets" in complaint(tmp_path, "[datasets]\nresolution = 64")
    assert "write [[datasets.subsets]] in double brackets" in complaint(
        tmp_path, '[[datasets]]\n[datasets.subsets]\nimage_dir = "a"'
    )


def test_a_key_above_all_tables_is_told_its_place(tmp_path: Path) -> None:
    message = complaint(tmp_path, 'batch_size = 2\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"')
    assert "top level: unknown key batch_size = 2; it belongs in [general] or [[datasets]]" in message


def test_a_windows_path_in_double_quotes_is_explained(tmp_path: Path) -> None:
    message = complaint(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\images\\x"')
    assert "single quotes" in message and "data.toml" in message


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "ends in .toml or .json" in complaint(tmp_path, "", "data.yaml")


def test_buckets_that_do_not_suit_the_model_or_the_resolution_are_refused(tmp_path: Path) -> None:
    subset = '\n[[datasets.subsets]]\nimage_dir = "a"'
    message = complaint(tmp_path, "[[datasets]]\nenable_bucket = true\nbucket_reso_steps = 48" + subset)
    assert "bucket_reso_steps = 48; expected a multiple of 64" in message
    message = complaint(
        tmp_path,
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 2048" + subset + "\n[[datasets]]" + subset,
    )
    assert "[[datasets]] 1: max_bucket_reso = 1024 is below the resolution 2048x2048" in message
    assert "[[datasets]] 2: min_bucket_reso = 256 is above the resolution 64x64" in message


def test_bucket_limits_are_brought_to_the_grid(tmp_path: Path) -> None:
    text = "[[datasets]]\nenable_bucket = true\nresolution = 256\nmin_bucket_reso = 200\nmax_bucket_reso = 1000"
    (dataset,) = read(tmp_path, text + '\n[[datasets.subsets]]\nimage_dir = "a"').datasets
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (192, 1024)


def test_resolution_must_come_from_somewhere(tmp_path: Path) -> None:
    (tmp_path / "1_x").mkdir()
    with pytest.raises(ValueError, match="resolution is missing; give --resolution"):
        read_dataset_config(DatasetFlags(train_data_dir=str(tmp_path)), CaptionFlags(), bucket_multiple=64)


def test_a_folder_without_repeats_explains_the_form(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="10_name"):
        read_dataset_config(DatasetFlags(train_data_dir=str(tmp_path), **FLAGS), CaptionFlags(), bucket_multiple=64)


def test_images_beside_the_numbered_folders_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1_x").mkdir()
    (tmp_path / "loose.png").touch()
    read_dataset_config(DatasetFlags(train_data_dir=str(tmp_path), **FLAGS), CaptionFlags(), bucket_multiple=64)
    assert "1 images are not used, because they lie beside the numbered folders" in caplog.text


def test_no_data_at_all_names_both_ways() -> None:
    with pytest.raises(ValueError, match=r"--dataset_config.*--train_data_dir"):
        read_dataset_config(DatasetFlags(**FLAGS), CaptionFlags(), bucket_multiple=64)


def test_subsets_with_no_repeats_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 0\n[[datasets.subsets]]\nimage_dir = "b"'
    assert [subset.image_dir for subset in read(tmp_path, text).datasets[0].subsets] == [Path("b")]
    assert "a is not used, since num_repeats is 0" in caplog.text


DOCS = Path(__file__).resolve().parents[3] / "docs/dataset.md"
SCHEMA = Path(__file__).resolve().parents[2] / "facts/dataset/schema.json"


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    example = DOCS.read_text(encoding="utf-8").split("```toml")[1].split("```")[0]
    (dataset,) = read(tmp_path, example).datasets
    assert (dataset.batch_size, dataset.enable_bucket, dataset.resolution) == (2, True, (512, 512))
    assert [subset.is_reg for subset in dataset.subsets] == [False, True]


def test_every_published_key_is_known_at_its_levels_and_stands_on_the_page() -> None:
    page = DOCS.read_text(encoding="utf-8")
    tables = {"general": GeneralTable, "datasets": DatasetTable, "subsets": SubsetTable}
    keys = json.loads(SCHEMA.read_text(encoding="utf-8"))["keys"]
    for key, facts in keys.items():
        assert [name for name, table in tables.items() if key in table.model_fields] == facts["levels"], key
        assert f"`{key}`" in page
