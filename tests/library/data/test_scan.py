"""Captions that are missing, images that are broken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.scan import ScannedDataset, scan_images


def scan(*subsets: SubsetSettings, allow_uncaptioned: bool = False, skip_corrupt: bool = False) -> ScannedDataset:
    config = DatasetConfig((DatasetSettings((64, 64), subsets),))
    (scanned,) = scan_images(config, allow_uncaptioned=allow_uncaptioned, skip_corrupt=skip_corrupt)
    return scanned


def test_txt_is_read_when_there_is_no_caption_file_at_all(tmp_path: Path, image: Callable[..., Path]) -> None:
    image(tmp_path / "a.png", (8, 8))
    (tmp_path / "a.txt").write_text("\ufeffa cat \nsecond", encoding="utf-8")
    assert scan(SubsetSettings(tmp_path)).items[0].caption == "a cat"
    chosen = SubsetSettings(tmp_path, extension_chosen=True, class_tokens="cls")
    assert scan(chosen).items[0].caption == "cls"


def test_txt_is_not_read_beside_caption_files(tmp_path: Path, image: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        image(tmp_path / f"{name}.png", (8, 8))
    (tmp_path / "a.caption").write_text("a cat", encoding="utf-8")
    (tmp_path / "b.txt").write_text("a dog", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 image\(s\) have no caption(.|\n)*b\.png: no b\.caption"):
        scan(SubsetSettings(tmp_path))


def test_images_without_caption_may_be_allowed(
    tmp_path: Path, image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = image(tmp_path / "a.png", (8, 8))
    assert scan(SubsetSettings(tmp_path), allow_uncaptioned=True).items[0].caption == ""
    assert str(path) in caplog.text


def test_every_broken_image_and_caption_is_named_at_once(tmp_path: Path, image: Callable[..., Path]) -> None:
    content = image(tmp_path / "good.png", (8, 8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:60])
    (tmp_path / "text.jpg").write_text("not an image", encoding="utf-8")
    (tmp_path / "good.caption").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError) as caught:
        scan(SubsetSettings(tmp_path))
    message = str(caught.value)
    assert "2 image(s) cannot be read; repair or remove them, or use --skip_corrupt" in message
    assert f"{tmp_path / 'cut.png'}:" in message and f"{tmp_path / 'text.jpg'}: not an image" in message
    assert "good.caption: not UTF-8" in message


def test_broken_images_can_be_left_out_even_when_only_decoding_shows_it(
    tmp_path: Path, image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        image(tmp_path / f"{name}.png", (32, 32))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "a.png").write_bytes(content)
    items = scan(SubsetSettings(tmp_path, class_tokens="x"), skip_corrupt=True).items
    assert [item.path.name for item in items] == ["b.png"]
    assert "a.png" in caplog.text and "left out" in caplog.text


def test_a_long_list_of_files_is_cut(tmp_path: Path, image: Callable[..., Path]) -> None:
    for number in range(25):
        image(tmp_path / f"{number:02d}.bmp", (8, 8))
    with pytest.raises(ValueError, match="and 5 more"):
        scan(SubsetSettings(tmp_path))


def test_images_in_other_formats_are_mentioned(
    tmp_path: Path, image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    image(tmp_path / "a.png", (8, 8))
    (tmp_path / "b.gif").write_bytes(b"GIF89a")
    with caplog.at_level(logging.WARNING):
        scan(SubsetSettings(tmp_path, class_tokens="x"))
    assert "1 files are not used, such as b.gif" in caplog.text


def test_no_images_at_all_names_the_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no training images were found in: .*nowhere"):
        scan(SubsetSettings(tmp_path / "nowhere"))
