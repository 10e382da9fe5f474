"""A hundred dataset files with a mistake each: one clear error that names the file, the table and the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.config import read_dataset_config
from library.data.dataset import load_training_set
from library.flags.dataset import CaptionFlags, DatasetFlags

DATASET = "[[datasets]]\nresolution = 64\n"
SUBSET = "[[datasets.subsets]]\nimage_dir = '@'\n"
FIRST, ITS_SUBSET = "[[datasets]] 1", "[[datasets.subsets]] 1 of [[datasets]] 1"

IN_DATASET = {
    "resolution": ["'512'", "0", "-64", "[64]", "[64, 64, 64]", "[64, 0]", "true", "[]"],
    "batch_size": ["0", "'2'", "1.5", "[1]"],
    "enable_bucket": ["'true'", "1"],
    "min_bucket_reso": ["0", "'small'"],
    "max_bucket_reso": ["-1"],
    "bucket_reso_steps": ["0", "64.0"],
    "network_multiplier": ["'1'", "nan", "inf"],
    "validation_split": ["1.5", "-0.1", "nan"],
    "validation_seed": ["'x'"],
}
IN_SUBSET = {
    "num_repeats": ["'10'", "1.5"],
    "is_reg": ["'no'"],
    "class_tokens": ["5"],
    "caption_extension": ["1"],
    "shuffle_caption": ["'False'"],
    "keep_tokens": ["-1", "'1'"],
    "caption_dropout_rate": ["1.1", "-0.1", "'0.1'"],
    "caption_dropout_every_n_epochs": ["-1", "1.5"],
    "token_warmup_step": ["-1", "inf"],
    "flip_aug": ["'yes'"],
    "resize_interpolation": ["'sinc'", "3"],
    "face_crop_aug_range": ["'1,2'", "[1.0]"],
    "custom_attributes": ["'x'"],
    "image_dir_": ["'x'"],
}
"""Key -> values, in TOML, that it cannot have."""

TOML: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty file": ("", ("datasets",)),
    "only a comment": ("# nothing here\n", ("datasets",)),
    "only general": ("[general]\nflip_aug = true\n", ("datasets", "[[datasets]]")),
    "one bracket for datasets": ("[datasets]\nresolution = 64\n", ("[[datasets]]", "double brackets")),
    "datasets is a number": ("datasets = 5\n", ("[[datasets]]",)),
    "datasets of texts": ("datasets = ['x']\n", ("[[datasets]] 1",)),
    "no datasets": ("datasets = []\n", ("datasets",)),
    "dataset without subsets": (DATASET, (FIRST, "subsets")),
    "one bracket for subsets": (DATASET + "[datasets.subsets]\nimage_dir = 'x'\n", ("[[datasets.subsets]]",)),
    "subsets is a text": (DATASET + "subsets = 'x'\n", (FIRST, "subsets")),
    "general is a number": ("general = 5\n" + DATASET + SUBSET, ("general",)),
    "general in double brackets": ("[[general]]\nflip_aug = true\n" + DATASET + SUBSET, ("general",)),
    "subsets at the top": ("[[subsets]]\nimage_dir = 'x'\n" + DATASET + SUBSET, ("subsets",)),
    "dataset for datasets": ("[[dataset]]\nresolution = 64\n", ("dataset", "did you mean datasets?")),
    "key at the top": ("resolution = 64\n" + DATASET + SUBSET, ("resolution", "[general]")),
    "near key": (DATASET + "resolutoin = 64\n" + SUBSET, (FIRST, "resolutoin", "did you mean resolution?")),
    "near key of a subset": (DATASET + SUBSET + "shufle_caption = true\n", (ITS_SUBSET, "shuffle_caption")),
    "key unlike any": (DATASET + SUBSET + "zzzzqqq = 1\n", (ITS_SUBSET, "zzzzqqq", "known keys are")),
    "flag of the command line": (DATASET + SUBSET + "prior_loss_weight = 1.0\n", ("--prior_loss_weight",)),
    "subset key in general": ("[general]\nimage_dir = 'x'\n" + DATASET + SUBSET, ("[general]", "image_dir")),
    "subset key in a dataset": (DATASET + "image_dir = 'x'\n" + SUBSET, (FIRST, "image_dir", "[[datasets.subsets]]")),
    "dataset key in a subset": (DATASET + SUBSET + "batch_size = 2\n", (ITS_SUBSET, "batch_size", "[[datasets]]")),
    "no source of images": (DATASET + "[[datasets.subsets]]\nnum_repeats = 2\n", (ITS_SUBSET, "image_dir is missing")),
    "same key under two names": (
        DATASET + SUBSET + "interpolation_type = 'area'\nresize_interpolation = 'box'\n",
        (ITS_SUBSET, "interpolation_type", "resize_interpolation"),
    ),
    "no resolution": ("[[datasets]]\n" + SUBSET, (FIRST, "resolution is missing")),
    "steps off the model's grid": (
        DATASET + "enable_bucket = true\nbucket_reso_steps = 12\n" + SUBSET,
        (FIRST, "bucket_reso_steps = 12"),
    ),
    "smallest bucket above the resolution": (
        DATASET + "enable_bucket = true\nmin_bucket_reso = 256\n" + SUBSET,
        (FIRST, "min_bucket_reso = 256"),
    ),
    "largest bucket below the resolution": (
        "[[datasets]]\nresolution = 2048\nenable_bucket = true\n" + SUBSET,
        (FIRST, "max_bucket_reso = 1024"),
    ),
    "text without an end": (DATASET + "[[datasets.subsets]]\nimage_dir = 'x\n", ("line 4",)),
    "text of lines without an end": (DATASET + '[[datasets.subsets]]\nimage_dir = """x\n', ("not a valid .toml",)),
    "key without a value": (DATASET + "enable_bucket =\n" + SUBSET, ("line 3",)),
    "key without a sign": (DATASET + "enable_bucket\n" + SUBSET, ("line 3",)),
    "word for a value": (DATASET + "enable_bucket = True\n" + SUBSET, ("line 3",)),
    "list without an end": (DATASET + "resolution2 = [64, 64\n" + SUBSET, ("not a valid .toml",)),
    "table without an end": ("[[datasets\nresolution = 64\n", ("not a valid .toml",)),
    "key twice": (DATASET + "resolution = 96\n" + SUBSET, ("not a valid .toml",)),
    "table twice": ("[general]\n[general]\n" + DATASET + SUBSET, ("not a valid .toml",)),
    "path of Windows that TOML can read": (
        DATASET + '[[datasets.subsets]]\nimage_dir = "C:\\train\\new"\n',
        ("image_dir", "single quotes"),
    ),
    "path of Windows": (DATASET + '[[datasets.subsets]]\nimage_dir = "C:\\images\\new"\n', ("single quotes",)),
    "list of mixed brackets": (DATASET + "batch_size = [1, 2}\n" + SUBSET, ("not a valid .toml",)),
    "a lone bracket": ("[\n", ("not a valid .toml",)),
    "a lone sign": ("= 5\n", ("not a valid .toml",)),
    "JSON": ('{"datasets": []}', ("not a valid .toml",)),
    "list of unlike numbers": (DATASET.replace("64", "[64.5, 64]") + SUBSET, ("line 2",)),
    "folder without a name": (DATASET + "[[datasets.subsets]]\nimage_dir = ''\n", (ITS_SUBSET, "image_dir")),
    "date": (DATASET + "batch_size = 2020-01-01\n" + SUBSET, (FIRST, "batch_size")),
    "path that no system has": (DATASET + '[[datasets.subsets]]\nimage_dir = "a\\u0000b"\n', ("image_dir",)),
    "folder that is not there": (DATASET + "[[datasets.subsets]]\nimage_dir = 'nowhere/at/all'\n", ("nowhere",)),
    "file for a folder": (DATASET + "[[datasets.subsets]]\nimage_dir = '@/1.png'\n", ("1.png",)),
    "folder without images": (DATASET + "[[datasets.subsets]]\nimage_dir = '@/empty'\n", ("empty",)),
}
"""Name -> content and what the message must say, besides the name of the file; @ is a folder with an image."""

GOOD = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "@"}]}]}
JSON: dict[str, tuple[str, tuple[str, ...]]] = {
    "cut": (json.dumps(GOOD)[:-5], ("not a valid .json",)),
    "comma at the end": ('{"datasets": [],}', ("not a valid .json",)),
    "comment": ('{"datasets": [] // none\n}', ("not a valid .json",)),
    "single quotes": ("{'datasets': []}", ("not a valid .json",)),
    "list": ("[]", ("list",)),
    "text": ('"datasets"', ("str",)),
    "null": ("null", ("NoneType",)),
    "nothing": ("", ("not a valid .json",)),
    "datasets null": ('{"datasets": null}', ("datasets",)),
    "dataset null": ('{"datasets": [null]}', (FIRST,)),
    "subset null": ('{"datasets": [{"resolution": 64, "subsets": [null]}]}', ("[[datasets.subsets]] 1",)),
    "key twice": ('{"datasets": [], "datasets": []}', ("datasets", "twice")),
    "not a number": (json.dumps(GOOD).replace("64", "NaN"), ("resolution",)),
    "very deep": ('{"datasets": ' + "[" * 100_000, ("not a valid .json",)),
}
BYTES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "UTF-16": (".toml", (DATASET + SUBSET).encode("utf-16"), ("UTF-8",)),
    "Latin 1": (".toml", (DATASET + "# ä\n" + SUBSET).encode("latin-1"), ("UTF-8", "byte")),
    "a picture": (".json", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ("UTF-8",)),
    "zeros": (".toml", bytes(100), ("not a valid .toml",)),
    "another ending": (".yaml", b"datasets: []", (".toml or .json",)),
    "no ending": ("", b"", (".toml or .json",)),
}


def bad_values() -> dict[str, tuple[str, tuple[str, ...]]]:
    """A file for each value of the two tables above."""
    files = {}
    for key, values in IN_DATASET.items():
        for value in values:
            table = "[[datasets]]\n" if key == "resolution" else DATASET
            files[f"{key} = {value}"] = (f"{table}{key} = {value}\n{SUBSET}", (FIRST, key))
    for key, values in IN_SUBSET.items():
        for value in values:
            files[f"{key} = {value}"] = (f"{DATASET}{SUBSET}{key} = {value}\n", (ITS_SUBSET, key))
    return files


CASES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    **{f"TOML, {name}": (".toml", text.encode(), says) for name, (text, says) in (TOML | bad_values()).items()},
    **{f"JSON, {name}": (".json", text.encode(), says) for name, (text, says) in JSON.items()},
    **{f"bytes, {name}": case for name, case in BYTES.items()},
}


def read(path: Path) -> None:
    """All that the trainer does with the file before it loads a model."""
    flags = DatasetFlags(dataset_config=path, dataset_repeats=1)
    load_training_set(read_dataset_config(flags, CaptionFlags(), bucket_multiple=8))


@pytest.fixture
def pictures(tmp_path: Path, image: Callable[..., Path]) -> Path:
    folder = tmp_path / "pictures"
    image(folder / "1.png", (64, 64)).with_suffix(".txt").write_text("a dog", encoding="utf-8")
    (folder / "empty").mkdir()
    return folder


def test_there_are_a_hundred_of_them() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_one_error_names_what_is_wrong(name: str, tmp_path: Path, pictures: Path) -> None:
    ending, content, says = CASES[name]
    path = tmp_path / f"mine{ending}"
    path.write_bytes(content.replace(b"@", pictures.as_posix().encode()))
    with pytest.raises(ValueError) as caught:
        read(path)
    assert type(caught.value) is ValueError  # no kind of its own, such as a decoder's or pydantic's
    message = str(caught.value)
    # What is wrong with a folder is found when the file has long been read; the folder is what to look for then.
    named = path.name in message or "no training images" in message
    assert named and [word for word in says if word not in message] == [], message
    assert "pydantic" not in message and "Traceback" not in message and len(message) < 1500


def test_several_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[general]\nflip = 1\n[[datasets]]\nresolution = 'x'\n[[datasets.subsets]]\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: 2 mistakes\n") or "3 mistakes" in str(caught.value)


@pytest.mark.parametrize("name", ["there is none", "a folder"])
def test_a_file_that_is_not_there_is_named_with_its_flag(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.toml"
    if name == "a folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"--dataset_config .*mine\.toml: there is no such file"):
        read(path)


@pytest.mark.parametrize("ending", [".toml", ".json", ".TOML"])
def test_a_mark_at_the_beginning_and_line_ends_of_windows_are_no_mistake(
    tmp_path: Path, pictures: Path, ending: str
) -> None:
    text = json.dumps(GOOD) if ending == ".json" else (DATASET + SUBSET).replace("\n", "\r\n")
    path = tmp_path / f"mine{ending}"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("@", pictures.as_posix()).encode())
    read(path)


def test_no_cut_of_a_good_file_breaks_more_than_the_file(tmp_path: Path, pictures: Path) -> None:
    # Some beginnings of a file are whole files; all others are mistakes of the user, never of the program.
    text = '[general]\nflip_aug = true\ncaption_prefix = "a"\n' + DATASET + "network_multiplier = 1.5\n" + SUBSET
    whole = text.replace("@", pictures.as_posix()).encode()
    path = tmp_path / "mine.toml"
    failed = 0
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        try:
            read(path)
        except ValueError as error:
            failed += 1
            assert type(error) is ValueError
    assert failed > 60
