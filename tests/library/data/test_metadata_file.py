"""Metadata files: how keys name images, what the caption becomes, and what is said about mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set

Image = Callable[..., Path]


@pytest.fixture
def load(tmp_path: Path, image: Image) -> Callable[..., TrainingSet]:
    """`load({"a": {"caption": "x"}})` with the images a.png, b.jpg, twin.png and twin.jpg in the folder `in`."""
    for name in ("a.png", "b.jpg", "v1.5 cat.png", "twin.png", "twin.jpg"):
        image(tmp_path / "in" / name, (64, 48))

    def load_from(content: Any, name: str = "m.json", **changes: Any) -> TrainingSet:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        settings = {"image_dir": tmp_path / "in", "metadata_file": tmp_path / name} | changes
        allow = settings.pop("allow_uncaptioned", False)
        config = DatasetConfig((DatasetSettings((64, 64), (SubsetSettings(**settings),)),))
        return load_training_set(config, allow_uncaptioned=allow)

    return load_from


def found(data: TrainingSet) -> dict[str, str]:
    return {item.path.name: item.caption for item in data.datasets[0].items}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a", "a.png"),
        ("a.png", "a.png"),
        ("v1.5 cat", "v1.5 cat.png"),
        ("@/a.png", "a.png"),
        ("@/b", "b.jpg"),
        ("../in/b.jpg", "b.jpg"),
        ("..\\in\\b.jpg", "b.jpg"),
        ("twin.jpg", "twin.jpg"),
    ],
)
def test_a_key_is_a_stem_a_file_name_or_a_path(
    load: Callable[..., TrainingSet], key: str, name: str, tmp_path: Path
) -> None:
    data = load({key.replace("@", (tmp_path / "in").as_posix()): {"caption": "x"}})
    assert found(data) == {name: "x"}


def test_a_path_from_where_the_tool_was_run_is_understood(
    load: Callable[..., TrainingSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(load({"in/a.png": {"caption": "x"}}, image_dir=Path("in"))) == {"a.png": "x"}


def test_whole_paths_need_no_folder(load: Callable[..., TrainingSet], tmp_path: Path) -> None:
    assert found(load({str(tmp_path / "in/a.png"): {"caption": "x"}}, image_dir=None)) == {"a.png": "x"}
    with pytest.raises(ValueError, match=r'm\.json: key "a\.png": a path that starts nowhere; expected image_dir'):
        load({"a.png": {"caption": "x"}}, image_dir=None)


@pytest.mark.parametrize(
    ("entry", "wildcard", "caption"),
    [
        ({"caption": "c", "tags": "t, u"}, False, "c;t, u"),
        ({"tags": "t"}, False, "t"),
        ({"caption": "c", "tags": ""}, False, "c"),
        ({"caption": "c", "tags": None}, True, "c"),
        ({"caption": "c\n\nd", "tags": "t\nu"}, True, "c;t;u\nd;t;u"),
        ({"caption": "", "tags": "t"}, True, "t"),
        ({"caption": " \n", "tags": "t"}, True, "t"),
    ],
)
def test_tags_follow_the_caption(
    load: Callable[..., TrainingSet], entry: dict[str, str], wildcard: bool, caption: str
) -> None:
    captions = CaptionSettings(caption_separator=";", enable_wildcard=wildcard)
    assert found(load({"a": entry}, captions=captions)) == {"a.png": caption}


def test_lines_name_images_in_a_jsonl_file(load: Callable[..., TrainingSet]) -> None:
    text = '{"image_path": "a.png", "caption": "x"}\n\n{"image_path": "b", "tags": "y"}\r\n'
    assert found(load(text, "m.jsonl")) == {"a.png": "x", "b.jpg": "y"}


def test_sizes_are_taken_from_the_file_or_from_the_image(load: Callable[..., TrainingSet]) -> None:
    data = load({"a": {"caption": "x", "image_size": [80, 64], "train_resolution": [64, 64]}, "b": {"caption": "y"}})
    assert [item.size for item in data.datasets[0].items] == [(80, 64), (64, 48)]


def test_images_that_the_file_does_not_name_are_counted(
    load: Callable[..., TrainingSet], caplog: pytest.LogCaptureFixture
) -> None:
    load({"a": {"caption": "x"}})
    assert "4 images are not used, since" in caplog.text and "b.jpg is one" in caplog.text


def test_images_without_any_words_are_named_unless_allowed(load: Callable[..., TrainingSet]) -> None:
    with pytest.raises(
        ValueError, match=r"1 image\(s\) have no caption(.|\n)*a\.png: neither caption nor tags in m\.json"
    ):
        load({"a": {}, "b": {"caption": "y"}})
    assert found(load({"a": {}}, allow_uncaptioned=True)) == {"a.png": ""}


def test_every_wrong_entry_is_named_in_one_message(load: Callable[..., TrainingSet]) -> None:
    with pytest.raises(ValueError) as caught:
        load(
            {
                "a": "a cat",
                "a.png": {"caption": 5},
                "b": {"caption": "y", "image_size": "64x48"},
                "gone": {"caption": "z"},
                "twin": {"caption": "z"},
                "": {"caption": "z"},
                "b.jpg": {"caption": "first"},
                "in/../b.jpg": {"caption": "x"},
            }
        )
    message = str(caught.value)
    assert "7 entries of metadata files cannot be used" in message
    for line in (
        'm.json: key "a": "a cat" stands there; expected caption, tags and image_size in braces',
        'm.json: key "a.png": caption = 5; expected text',
        'm.json: key "b": image_size = "64x48"; expected [width, height] in pixels',
        'm.json: key "gone": there is no such image in',
        'm.json: key "twin": names twin.jpg and twin.png alike; expected the file name with its ending',
        'm.json: key "": expected a path, a file name or a stem',
    ):
        assert line in message


def test_an_image_named_twice_is_a_mistake(load: Callable[..., TrainingSet]) -> None:
    with pytest.raises(ValueError, match=r'key "a\.png": names .*a\.png, as key \'a\' does'):
        load({"a": {"caption": "x"}, "a.png": {"caption": "y"}})


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("{", "m.json", r"m\.json: not a valid \.json file"),
        ("[1]", "m.json", r"m\.json: expected .* got a list"),
        ("[" * 100_000, "m.json", r"m\.json: not a valid \.json file"),
        ('{"image_path": "a"}\n{', "m.jsonl", r"m\.jsonl: line 2 is not valid JSON"),
        ('{"image": "a"}', "m.jsonl", r"m\.jsonl: line 1: expected"),
        ('{"image_path": "a"}\n{"image_path": "a"}', "m.jsonl", r"m\.jsonl: line 2 names a again"),
        ("", "m.txt", r"m\.txt: expected a file that ends in \.json or \.jsonl"),
    ],
)
def test_a_file_that_is_no_metadata_file_is_named(
    load: Callable[..., TrainingSet], content: str, name: str, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        load(content, name)


def test_a_missing_file_and_other_encodings_are_named(load: Callable[..., TrainingSet], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json: there is no such file"):
        load({}, metadata_file=tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes('{"a": {"caption": "é"}}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8 text"):
        load({}, metadata_file=tmp_path / "latin.json")
