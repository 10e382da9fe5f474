"""metadata_cache.json is used while it is true, and no longer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data import findings, folder_scan
from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.scan import scan_images

Image = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path, image: Image) -> Path:
    for name in ("x", "xy", "z"):
        image(tmp_path / f"{name}.png", (64, 48))
    (tmp_path / "x.txt").write_text("a cat\nsecond", encoding="utf-8")
    (tmp_path / "xy.txt").write_text("a dog", encoding="utf-8")
    return tmp_path


def scan(folder: Path, **changes: object) -> dict[str, tuple[str, tuple[int, int]]]:
    settings = {"class_tokens": "thing", "caption_extension": ".txt", "extension_chosen": True} | changes
    subset = SubsetSettings(folder, cache_info=True, **settings)  # type: ignore[arg-type]
    config = DatasetConfig((DatasetSettings((64, 64), (subset,)),))
    (scanned,) = scan_images(config, allow_uncaptioned=False, skip_corrupt=False)
    return {item.path.name: (item.caption, item.size) for item in scanned.items}


@pytest.fixture
def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images and caption files that are opened."""
    opened: list[str] = []
    size, read = findings.image_size, folder_scan._Captions._read

    def measured(path: Path) -> tuple[int, int]:
        opened.append(path.name)
        return size(path)

    def caption(self: folder_scan._Captions, file: Path) -> str:
        opened.append(file.name)
        return read(self, file)

    monkeypatch.setattr(findings, "image_size", measured)
    monkeypatch.setattr(folder_scan._Captions, "_read", caption)
    return opened


def later(path: Path, seconds: int = 5) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def test_the_second_scan_opens_nothing(pictures: Path, count_reads: list[str]) -> None:
    first = scan(pictures)
    assert first == {"x.png": ("a cat", (64, 48)), "xy.png": ("a dog", (64, 48)), "z.png": ("thing", (64, 48))}
    assert len(count_reads) == 5
    count_reads.clear()
    assert scan(pictures) == first and count_reads == []


def test_the_file_has_the_published_shape(pictures: Path) -> None:
    scan(pictures)
    content = json.loads((pictures / "metadata_cache.json").read_text(encoding="utf-8"))
    assert set(content) == {str(pictures / name) for name in ("x.png", "xy.png", "z.png")}
    entry = content[str(pictures / "xy.png")]
    assert (entry["caption"], entry["resolution"]) == ("a dog", [64, 48])


def test_an_edited_caption_is_read_again(pictures: Path, count_reads: list[str]) -> None:
    scan(pictures)
    count_reads.clear()
    (pictures / "x.txt").write_text("a rat", encoding="utf-8")
    later(pictures / "x.txt")
    assert scan(pictures)["x.png"] == ("a rat", (64, 48)) and count_reads == ["x.txt"]
    count_reads.clear()
    assert scan(pictures)["x.png"] == ("a rat", (64, 48)) and count_reads == []


def test_another_image_is_measured_again(pictures: Path, image: Image) -> None:
    scan(pictures)
    image(pictures / "x.png", (32, 96))
    assert scan(pictures)["x.png"] == ("a cat", (32, 96))


def test_a_caption_file_that_comes_or_goes_is_noticed(pictures: Path) -> None:
    scan(pictures)
    (pictures / "xy.txt").unlink()
    (pictures / "z.txt").write_text("new", encoding="utf-8")
    captions = {name: caption for name, (caption, _) in scan(pictures).items()}
    assert captions == {"x.png": "a cat", "xy.png": "thing", "z.png": "new"}


def test_other_settings_read_other_captions(pictures: Path) -> None:
    scan(pictures)
    assert scan(pictures, captions=CaptionSettings(enable_wildcard=True))["x.png"][0] == "a cat\nsecond"
    assert scan(pictures, class_tokens="else")["z.png"][0] == "else"
    (pictures / "x.cap").write_text("from cap", encoding="utf-8")
    assert scan(pictures, caption_extension=".cap")["x.png"][0] == "from cap"
    assert scan(pictures)["x.png"][0] == "a cat"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"x.png": 5}', '{"x.png": {"caption": "stale", "resolution": [1, 1]}}']
)
def test_a_file_that_proves_nothing_is_made_anew(pictures: Path, content: str, count_reads: list[str]) -> None:
    (pictures / "metadata_cache.json").write_text(content, encoding="utf-8")
    assert scan(pictures)["x.png"] == ("a cat", (64, 48))
    count_reads.clear()
    assert scan(pictures)["x.png"] == ("a cat", (64, 48)) and count_reads == []


def test_nothing_is_written_when_nothing_changes_and_nothing_half(pictures: Path) -> None:
    scan(pictures)
    before = (pictures / "metadata_cache.json").stat().st_mtime_ns
    scan(pictures)
    assert (pictures / "metadata_cache.json").stat().st_mtime_ns == before
    assert not list(pictures.glob("*.tmp*")) and not list(pictures.glob(".metadata*"))


def test_a_mistake_is_never_remembered(pictures: Path) -> None:
    (pictures / "x.txt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x\.txt: empty"):
            scan(pictures)


def test_without_the_setting_no_file_is_written(pictures: Path) -> None:
    subset = SubsetSettings(pictures, class_tokens="x")
    scan_images(DatasetConfig((DatasetSettings((64, 64), (subset,)),)), allow_uncaptioned=False, skip_corrupt=False)
    assert not (pictures / "metadata_cache.json").exists()
