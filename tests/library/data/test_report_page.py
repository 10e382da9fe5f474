"""The page and the text of the dataset doctor."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from library.data.checks import all_findings
from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.report import Asked, Collection, Finding, Remark, Severity, collect
from library.data.report_page import as_page
from library.data.report_text import as_text


class Reader(HTMLParser):
    """Notes every tag with its attributes; fails on tags that are closed in the wrong order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def seen(tmp_path: Path, image: Callable[..., Path]) -> Collection:
    folder = tmp_path / "3_cats & <dogs>"
    for number in range(40):
        path = image(folder / f"{number} <b>&'\" 猫.png", (48, 48) if number else (24, 96), number)
        path.with_suffix(".txt").write_text(f"cat, <script>alert({number})</script>, x", encoding="utf-8")
    captions = CaptionSettings(shuffle_caption=True, keep_tokens=1)
    subset = SubsetSettings(folder, num_repeats=3, captions=captions)
    sizes = {"enable_bucket": True, "min_bucket_reso": 16, "max_bucket_reso": 128, "bucket_reso_steps": 16}
    config = DatasetConfig((DatasetSettings((48, 48), (subset,), batch_size=4, **sizes),))  # type: ignore[arg-type]
    return collect(lambda: config, Asked(epochs=4))


def test_the_page_is_whole_and_asks_for_nothing_elsewhere(seen: Collection) -> None:
    page = as_page(seen, all_findings(seen))
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "b<", "object"})
    addresses = [value or "" for _, found in reader.tags for name, value in found.items() if name in {"src", "href"}]
    assert addresses and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert re.search(r"https?:|//\w|url\(|@import", re.sub(r"base64,[\w+/=]+", "", page)) is None
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_names_and_captions_are_shown_and_not_obeyed(seen: Collection) -> None:
    page = as_page(seen, all_findings(seen))
    assert "&lt;script&gt;alert(" in page and "<script" not in page
    assert "1 &lt;b&gt;&amp;&#x27;&quot; 猫.png" in page


def test_a_sheet_shows_some_images_of_each_bucket_with_three_captions(seen: Collection) -> None:
    page = as_page(seen, all_findings(seen))
    assert page.count("<figure>") == page.count("<img ") == 24 + 1
    assert "Bucket 48x48: 39 images, 24 of them here" in page
    for figure in re.findall(r"<figcaption>.*?</figcaption>", page):
        captions = re.findall(r"<li>(.*?)</li>", figure)
        assert len(captions) == 3 and all(caption.startswith("cat, ") for caption in captions)
    assert len(page) < 200_000


def test_the_page_holds_at_most_so_many_pictures(tmp_path: Path, image: Callable[..., Path]) -> None:
    for number in range(30):
        image(tmp_path / f"{number}.png", (32, 32 + 16 * number), number)
    sizes = {"enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 16}
    many = DatasetConfig(
        (DatasetSettings((1024, 1024), (SubsetSettings(tmp_path, class_tokens="x"),), **sizes),) * 20  # type: ignore[arg-type]
    )
    page = as_page(collect(lambda: many, Asked()), [])
    assert page.count("<figure>") == 600 // 30 * 30  # one of each bucket at least


def test_the_histogram_has_a_bar_for_each_bucket_as_long_as_its_count(seen: Collection) -> None:
    bars = re.findall(r'<rect [^>]*width="(\d+)"', as_page(seen, []))
    assert [int(width) for width in bars] == [round(380 * 3 / 117), 380]


def test_the_text_lists_twenty_names_and_counts_the_rest(seen: Collection) -> None:
    remarks = tuple(Remark(f"{number}.png", "why") for number in range(25))
    finding = Finding("corrupt", Severity.STOPS, "25 images cannot be read", remarks, "repair them")
    text = as_text(seen, [finding])
    assert text.startswith("STOPS THE TRAINING\n  25 images cannot be read\n    0.png: why\n")
    assert "    19.png: why\n    and 5 more\n    -> repair them\n" in text
    assert "bucket     48x48: 39 images, 117 with repeats" in text
    assert "31 batches and 31 steps an epoch; 124 steps in 4 epochs" in text
    assert text.endswith("Found: 1 to mend before training")


def test_a_dataset_without_images_still_gives_a_page(tmp_path: Path) -> None:
    config = DatasetConfig((DatasetSettings((48, 48), (SubsetSettings(tmp_path / "nowhere"),)),))
    empty = collect(lambda: config, Asked())
    page = as_page(empty, all_findings(empty))
    Reader(page)
    assert "no training images were found" in page and "there is no such folder" in page
