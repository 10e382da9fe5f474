"""Captions and tags get into a metadata file, are cleaned there, and come out in the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clean_captions_and_tags
import merge_captions_to_metadata
import merge_dd_tags_to_metadata
from library.data.config import read_dataset_config
from library.data.dataset import load_training_set
from library.flags.dataset import CaptionFlags, DatasetFlags

ROOT = Path(__file__).resolve().parents[2]

Main = Callable[[list[str]], int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images with a caption and tags each."""
    folder = tmp_path / "images"
    folder.mkdir()
    for stem, caption, tags in (("a", " a cat\n", "cat, Käse"), ("図", "a dog", "dog,  large_ears ")):
        Image.new("RGB", (8, 8)).save(folder / f"{stem}.png")
        (folder / f"{stem}.caption").write_text(caption, encoding="utf-8")
        (folder / f"{stem}.txt").write_text(tags, encoding="utf-8")
    return folder


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_captions_and_tags_stand_under_the_stems(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "meta.json"
    assert merge_captions_to_metadata.main([str(folder), str(out)]) == 0
    assert read(out) == {"a": {"caption": "a cat"}, "図": {"caption": "a dog"}}
    assert merge_dd_tags_to_metadata.main([str(folder), str(out)]) == 0
    assert read(out) == {
        "a": {"caption": "a cat", "tags": "cat, Käse"},
        "図": {"caption": "a dog", "tags": "dog,  large_ears"},
    }
    text = out.read_text(encoding="ascii")
    assert text.startswith('{\n  "a": {\n    "caption": "a cat"') and '"\\u56f3"' in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["meta.json"]


def test_entries_of_other_images_are_kept(folder: Path, tmp_path: Path) -> None:
    before, out = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text('{"z": {"caption": "old", "train_resolution": [8, 8]}, "a": {"tags": "x"}}', encoding="utf-8")
    out.write_text('{"gone": {"caption": "replaced"}}', encoding="utf-8")
    assert merge_captions_to_metadata.main([str(folder), str(out), "--in_json", str(before)]) == 0
    assert read(out) == {
        "z": {"caption": "old", "train_resolution": [8, 8]},
        "a": {"tags": "x", "caption": "a cat"},
        "図": {"caption": "a dog"},
    }


def test_whole_paths_are_keys_and_folders_inside_are_searched(folder: Path, tmp_path: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more/a.jpg")
    (folder / "more/a.caption").write_text("another", encoding="utf-8")
    out = tmp_path / "meta.json"
    assert merge_captions_to_metadata.main([str(folder), str(out), "--full_path", "--recursive"]) == 0
    assert {key: entry["caption"] for key, entry in read(out).items()} == {
        str(folder / "a.png"): "a cat",
        str(folder / "more/a.jpg"): "another",
        str(folder / "図.png"): "a dog",
    }


@pytest.mark.parametrize(("flag", "value"), [("--caption_extension", "cap"), ("--caption_extention", ".cap")])
def test_the_ending_of_the_captions_can_be_said(folder: Path, tmp_path: Path, flag: str, value: str) -> None:
    for path in sorted(folder.glob("*.caption")):
        path.rename(path.with_suffix(".cap"))
    out = tmp_path / "meta.jsonl"
    assert merge_captions_to_metadata.main([str(folder), str(out), flag, value]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"image_path": "a", "caption": "a cat"}, {"image_path": "図", "caption": "a dog"}]


def test_tags_and_captions_are_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = tmp_path / "before.json", tmp_path / "after.json"
    entries = {
        "a": {"caption": "a young woman", "tags": "1girl, long_hair, rating:safe", "image_size": [8, 9]},
        "b": {"tags": "shirt, white shirt"},
        "c": {},
    }
    before.write_text(json.dumps(entries), encoding="utf-8")
    assert clean_captions_and_tags.main([str(before), str(out)]) == 0
    said = capsys.readouterr().err
    assert "1 of 3 entries have no tags, such as c" in said and "2 of 3 entries have no caption, such as b" in said
    assert read(out) == {
        "a": {"caption": "a girl", "tags": "1girl, long hair", "image_size": [8, 9]},
        "b": {"tags": "white shirt"},
        "c": {},
    }
    assert read(before) == entries


def test_the_folder_of_the_images_may_still_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text('{"a": {"tags": "a_b"}}', encoding="utf-8")
    assert clean_captions_and_tags.main([str(tmp_path), str(before), str(out)]) == 0
    assert read(out) == {"a": {"tags": "a b"}}
    assert f"{tmp_path} is not used" in capsys.readouterr().err


@pytest.mark.parametrize("main", [merge_captions_to_metadata.main, merge_dd_tags_to_metadata.main])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("a.[ct]*")], "1 of 2 images have no usable text"),
        (lambda folder: [path.write_bytes(b"\xff\xfe!") for path in folder.glob("a.[ct]*")], "not UTF-8 text"),
        (lambda folder: [path.unlink() for path in folder.glob("*.png")], "no images"),
        (lambda folder: Image.new("RGB", (4, 4)).save(folder / "a.jpg"), "have the same key, a; use --full_path"),
    ],
)
def test_what_cannot_be_merged_is_said_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Main, change: Any, message: str
) -> None:
    change(folder)
    assert main([str(folder), str(tmp_path / "meta.json")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{missing}", "{out}"], "there is no such folder"),
        (["{folder}", "{out}", "--recursive"], "--recursive needs --full_path"),
        (["{folder}", "{folder}/x.txt"], "ends in .json or .jsonl"),
        (["{folder}", "{missing}/x.json"], "there is no folder"),
        (["{folder}", "{out}", "--in_json", "{missing}.json"], "there is no such file"),
        (["{folder}", "{out}", "--in_json", "{broken}"], "not a valid .json file"),
        (["{folder}", "{out}", "--in_json", "{list}"], "got a list"),
        (["{folder}", "{out}", "--in_json", "{odd}"], "key 'a': expected"),
        (["{folder}", "{out}", "--in_json", "{number}"], "key 'a': caption is 5; expected text"),
    ],
)
def test_wrong_folders_and_files_give_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"missing": "nowhere", "out": "out.json", "broken": "b.json", "list": "l.json", "odd": "o.json"}
    paths = {name: tmp_path / place for name, place in (places | {"number": "n.json"}).items()}
    paths["broken"].write_text('{"a": ', encoding="utf-8")
    paths["list"].write_text("[]", encoding="utf-8")
    paths["odd"].write_text('{"a": "text"}', encoding="utf-8")
    paths["number"].write_text('{"a": {"caption": 5}}', encoding="utf-8")
    given = [word.format(folder=folder, **paths) for word in words]
    assert merge_captions_to_metadata.main(given) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and not paths["out"].exists()
    if "--in_json" in words:
        assert clean_captions_and_tags.main([given[-1], str(paths["out"])]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("keys", [[], ["--full_path"]])
def test_the_trainer_reads_what_the_tools_write(folder: Path, tmp_path: Path, keys: list[str]) -> None:
    out = tmp_path / "meta.json"
    for main in (merge_captions_to_metadata.main, merge_dd_tags_to_metadata.main):
        assert main([str(folder), str(out), *keys]) == 0
    assert clean_captions_and_tags.main([str(out), str(out)]) == 0
    flags = DatasetFlags(train_data_dir=str(folder), in_json=str(out), resolution=(64, 64))
    config = read_dataset_config(flags, CaptionFlags(), bucket_multiple=64)
    items = load_training_set(config).datasets[0].items
    assert {item.path.name: item.caption for item in items} == {
        "a.png": "a cat,cat, Käse",
        "図.png": "a dog,dog, large ears",
    }


def test_the_scripts_run_from_anywhere(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "meta.json"
    for name, words in (
        ("merge_captions_to_metadata", [folder, out]),
        ("merge_dd_tags_to_metadata", [folder, out]),
        ("clean_captions_and_tags", [out, out]),
    ):
        command = [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    assert read(out)["図"] == {"caption": "a dog", "tags": "dog, large ears"}
