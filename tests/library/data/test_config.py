"""Precedence, and what is said about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.config import DatasetConfig, read_dataset_config
from library.data.kinds import Kind
from library.data.schema import DatasetTable, GeneralTable, SubsetTable
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.monitor import ValidationFlags

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


def test_every_key_of_a_subset_is_read(tmp_path: Path) -> None:
    text = """
        [general]
        color_aug = true
        face_crop_aug_range = [1.0, 2.5]
        [[datasets]]
        cache_info = true
        validation_split = 0.25
        validation_seed = 5
        [[datasets.subsets]]
        image_dir = "a"
        alpha_mask = true
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = "m.json"
        color_aug = false
    """
    folders, metadata = read(tmp_path, text).datasets
    (subset,) = folders.subsets
    assert (subset.color_aug, subset.face_crop_aug_range, subset.cache_info) == (True, (1.0, 2.5), True)
    assert subset.alpha_mask and subset.kind is Kind.FOLDERS
    assert (folders.validation_split, folders.validation_seed) == (0.25, 5)
    (subset,) = metadata.subsets
    assert (subset.metadata_file, subset.image_dir, subset.source) == (Path("m.json"), None, Path("m.json"))
    assert (subset.kind, subset.color_aug, subset.alpha_mask) == (Kind.METADATA, False, False)
    assert (metadata.validation_split, metadata.validation_seed) == (0.0, 0)


def test_flags_fill_what_the_file_leaves_out_but_never_a_path(tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    file.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"', encoding="utf-8")
    flags = DatasetFlags(
        dataset_config=file,
        alpha_mask=True,
        cache_info=True,
        color_aug=True,
        face_crop_aug_range=(1.0, 2.0),
        conditioning_data_dir="c",
        in_json="m.json",
        **FLAGS,
    )
    held_out = ValidationFlags(validation_split=0.5)
    (dataset,) = read_dataset_config(flags, CaptionFlags(), held_out, bucket_multiple=64, seed=9).datasets
    (subset,) = dataset.subsets
    assert subset.alpha_mask and subset.cache_info and subset.color_aug and subset.face_crop_aug_range == (1.0, 2.0)
    assert subset.conditioning_data_dir is None and subset.metadata_file is None
    assert (dataset.validation_split, dataset.validation_seed) == (0.5, 9)


def test_the_older_validation_table_is_a_dataset_that_is_held_out(tmp_path: Path) -> None:
    text = """
        [general]
        flip_aug = true
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a"
        [validation]
        batch_size = 3
        resolution = 128
        [[validation.subsets]]
        image_dir = "b"
    """
    training, validation = read(tmp_path, text).datasets
    assert (training.validation_split, validation.validation_split) == (0.0, 1.0)
    assert (validation.batch_size, validation.resolution) == (3, (128, 128))
    assert validation.subsets[0].image_dir == Path("b") and validation.subsets[0].flip_aug


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("validation_split = 0.5", "[validation]: unknown key validation_split = 0.5; it belongs in"),
        (
            '[[validation.subsets]]\nimage_dri = "b"',
            '[[validation.subsets]] 1 of [validation]: unknown key image_dri = "b"',
        ),
        ("[[validation.subsets]]\nflip_aug = true", "[[validation.subsets]] 1 of [validation]: image_dir is missing"),
        ('[[validation.subsets]]\nimage_dir = "b"\nis_reg = true', "is_reg = True"),
        ("[validation.subsets]", "write [[validation.subsets]] in double brackets"),
    ],
)
def test_mistakes_in_the_validation_table_are_named(tmp_path: Path, lines: str, expected: str) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n[validation]\nresolution = 64\n' + lines
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ('metadata_file = "m"', 'image_dir = "b"', "subset 1 has metadata_file; expected one kind in a dataset"),
        ('image_dir = "b"', 'metadata_file = "m"', "it has metadata_file, but subset 1 has neither"),
        (
            'image_dir = "b"',
            'image_dir = "a"\nconditioning_data_dir = "c"',
            "it has conditioning_data_dir, but subset 1 has neither",
        ),
    ],
)
def test_kinds_do_not_mix_in_one_dataset(tmp_path: Path, first: str, second: str, expected: str) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\n{first}\n[[datasets.subsets]]\n{second}"
    message = complaint(tmp_path, text)
    assert "data.toml" in message and "[[datasets.subsets]] 2 of [[datasets]] 1: " in message and expected in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('metadata_file = "m"\nis_reg = true', "is_reg = True cannot be used with metadata_file"),
        ('metadata_file = "m"\nclass_tokens = "dog"', "class_tokens = 'dog' cannot be used with metadata_file"),
        (
            'metadata_file = "m"\ncaption_extension = ".txt"',
            "caption_extension = '.txt' cannot be used with metadata_file",
        ),
        ('image_dir = "a"\nmetadata_file = "m"\nconditioning_data_dir = "c"', "for different kinds; keep one"),
        (
            'image_dir = "a"\nconditioning_data_dir = "c"\nalpha_mask = true',
            "the mask comes from conditioning_data_dir",
        ),
        ('conditioning_data_dir = "c"', "image_dir is missing"),
        ('image_dir = "a"\nconditioning_data_dir = "c"', "conditioning_data_dir = 'c' would have no effect"),
        ('image_dir = "a"\nface_crop_aug_range = [3, 1]', "face_crop_aug_range = [3, 1]; expected two numbers"),
        ('image_dir = "a"\nface_crop_aug_range = ["1"]', "expected two numbers [least, most]"),
    ],
)
def test_keys_that_do_not_go_together_are_named(tmp_path: Path, lines: str, expected: str) -> None:
    assert expected in complaint(tmp_path, f"[[datasets]]\n[[datasets.subsets]]\n{lines}")


def pairs(tmp_path: Path, lines: str, **options: Any) -> DatasetConfig:
    file = tmp_path / "data.toml"
    text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "c"\n{lines}'
    file.write_text(text, encoding="utf-8")
    flags = DatasetFlags(dataset_config=file, **FLAGS)
    return read_dataset_config(flags, CaptionFlags(), bucket_multiple=64, **options)


def test_conditioning_images_are_masks_or_what_is_trained(tmp_path: Path) -> None:
    (masks,) = pairs(tmp_path, "", masked_loss=True).datasets
    (hints,) = pairs(tmp_path, 'class_tokens = "dog"', control=True).datasets
    assert (masks.masked_loss, hints.masked_loss) == (True, False)
    assert masks.subsets[0].conditioning_data_dir == Path("c") and masks.subsets[0].kind is Kind.CONDITIONING


@pytest.mark.parametrize("key", ["random_crop = true", "face_crop_aug_range = [1.0, 2.0]"])
def test_conditioning_images_cannot_follow_crops_at_random(tmp_path: Path, key: str) -> None:
    with pytest.raises(
        ValueError, match=r"data\.toml(.|\n)*\[\[datasets\]\] 1: subset 1: .* with conditioning_data_dir"
    ):
        pairs(tmp_path, key, masked_loss=True)


def test_a_control_trainer_takes_pairs_only(tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    file.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"', encoding="utf-8")
    flags = DatasetFlags(dataset_config=file, **FLAGS)
    with pytest.raises(ValueError, match="subset 1: conditioning_data_dir is missing"):
        read_dataset_config(flags, CaptionFlags(), bucket_multiple=64, control=True)


def test_flags_may_name_a_metadata_file_or_masks(tmp_path: Path) -> None:
    flags = DatasetFlags(train_data_dir="a", in_json="m.json", **FLAGS)
    (dataset,) = read_dataset_config(flags, CaptionFlags(), bucket_multiple=64).datasets
    assert (dataset.subsets[0].metadata_file, dataset.subsets[0].image_dir) == (Path("m.json"), Path("a"))
    flags = DatasetFlags(train_data_dir="a", conditioning_data_dir="c", dataset_repeats=3, **FLAGS)
    (dataset,) = read_dataset_config(flags, CaptionFlags(), bucket_multiple=64, masked_loss=True).datasets
    assert (dataset.subsets[0].conditioning_data_dir, dataset.subsets[0].num_repeats) == (Path("c"), 3)
    with pytest.raises(ValueError, match="--conditioning_data_dir has no effect without --masked_loss"):
        read_dataset_config(flags, CaptionFlags(), bucket_multiple=64)


@pytest.mark.parametrize("other", [{"conditioning_data_dir": "c"}, {"reg_data_dir": "r"}])
def test_flags_of_different_kinds_are_refused(other: dict[str, str]) -> None:
    flags = DatasetFlags(train_data_dir="a", in_json="m.json", **other, **FLAGS)
    with pytest.raises(ValueError, match="--in_json"):
        read_dataset_config(flags, CaptionFlags(), bucket_multiple=64, masked_loss=True)


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
