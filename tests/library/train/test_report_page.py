from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from library.flags.output import OutputFlags
from library.train.ending import Ending
from library.train.history import History, Picture, Point
from library.train.page_charts import Line, bar_chart, line_chart, smoothed, ticks
from library.train.page_pictures import MOST_MOMENTS, Thumbnails, chosen_moments
from library.train.report_page import LEAST_PAUSE, PageFacts, ReportPage, duration, page_path
from library.train.run_sheet import Table

VOID = {"meta", "link", "img", "br", "input"}


class Structure(HTMLParser):
    """Checks that tags are closed in order and collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def filled(folder: Path, steps: int = 300) -> History:
    history = History()
    for step in range(1, steps + 1):
        history.add({"loss/current": 1 / step, "loss/average": 0.1, "lr/unet": 1e-4, "lr/textencoder": 5e-5}, step)
    history.add({"loss/validation/average": 0.2, "time/step": 0.5, "memory/process_gb": 2.0}, steps)
    history.tables["validation/bins"] = (
        steps,
        [{"first": 0, "last": 99, "loss": 0.5}, {"first": 100, "last": 199, "loss": None}],
    )
    history.tables["timesteps"] = (steps, [{"first": i * 40, "last": i * 40 + 39, "count": i} for i in range(25)])
    history.add_event("save", steps, 1, {"path": "cats-000001.safetensors"})
    (folder / "sample").mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (640, 320), (80 * number, 0, 0)).save(folder / "sample" / f"{number}.png")
        entry = {"path": f"sample/{number}.png", "prompt": 'a <cat> & "hat"', "index": 0}
        history.add_event("preview", number * 100, 1, {"pictures": [entry]})
    return history


def facts() -> PageFacts:
    return PageFacts(
        name="cats <1>",
        steps=400,
        epochs=4,
        settings=[
            Table("Network", ("setting", "value"), (("network_dim", "4"), ("network_alpha", "1")), frozenset({0}))
        ],
        tables=[Table("captions as they are read", ("image", "tokens", "caption"), (("a.png", "9/75", "'<b>'"),))],
        buckets=Table("buckets", ("size", "images", "with repeats", "batches"), (("512x512", "4", "1,200", "2"),)),
        warnings=["<script>alert(1)</script>"],
    )


def written(folder: Path, history: History | None = None, ending: Ending | None = None) -> str:
    page = ReportPage(folder / "cats.report.html", facts())
    page.close(filled(folder) if history is None else history, ending or Ending())
    return (folder / "cats.report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_holds_every_section(tmp_path: Path) -> None:
    structure = Structure(written(tmp_path))
    assert structure.headings == [
        *("cats <1>", "Loss", "Learning rate", "Validation loss", "Seconds per step", "Memory, GB"),
        *("validation/bins (step 300)", "Previews", "Buckets, images with repeats", "Timesteps drawn"),
        *("Events", "Warnings", "Captions as they are read", "Settings in force"),
    ]
    assert structure.count["polyline"] == 2 + 2 + 1 + 1 + 1
    assert structure.count["figure"] == 3
    marked = [value for _, name, value in structure.attributes if (name, value) == ("class", "marked")]
    assert len(marked) == 1


def test_the_page_says_how_the_run_ended(tmp_path: Path) -> None:
    assert '<p class="ending">finished</p>' in written(tmp_path)
    text = written(tmp_path, ending=Ending.failed(OSError("no space left on <disk>\nmore")))
    assert '<p class="ending failure">failed: no space left on &lt;disk&gt;</p>' in text and "reload" not in text
    assert 'class="ending' not in ReportPage(tmp_path / "page.html", facts()).html(filled(tmp_path))
    assert Ending.failed(AssertionError()).text == "failed: AssertionError"


def test_a_page_without_an_ending_carries_its_time_so_that_it_can_say_that_the_run_was_killed(tmp_path: Path) -> None:
    before = int(time.time())
    going = Structure(ReportPage(tmp_path / "page.html", facts()).html(filled(tmp_path)))
    times = [int(value) for _, name, value in going.attributes if name == "data-written"]
    assert len(times) == 1 and before <= times[0] <= time.time() + 1
    assert "data-written" not in [name for _, name, _ in Structure(written(tmp_path)).attributes]


def test_the_page_needs_nothing_from_outside_and_escapes_what_users_write(tmp_path: Path) -> None:
    text = written(tmp_path)
    structure = Structure(text)
    assert structure.count["script"] == 1 and "alert(1)" in text and "<script>alert" not in text
    links = [value for _, name, value in structure.attributes if name in ("src", "href")]
    assert all(link.startswith(("data:", "sample/")) for link in links), links
    assert not re.search(r"https?:|@import|url\(", text)
    assert "a &lt;cat&gt; &amp; &quot;hat&quot;" in text


def test_the_data_for_the_pointer_is_json(tmp_path: Path) -> None:
    structure = Structure(written(tmp_path))
    charts = [json.loads(value) for _, name, value in structure.attributes if name == "data-chart"]
    assert [line[0] for line in charts[0]["lines"]] == ["loss", "smoothed"]
    assert charts[1]["lines"][0][1][-1] == [300, 0.0001]


def test_a_long_run_with_many_previews_makes_a_page_of_bounded_size(tmp_path: Path) -> None:
    history = filled(tmp_path, steps=20_000)
    for step in range(1000):
        history.pictures += [Picture(Path("sample/1.png"), f"prompt {i}", i, step) for i in range(1, 20)]
    assert len(written(tmp_path, history)) < 1_500_000


def test_a_page_before_the_first_step_is_a_page_too(tmp_path: Path) -> None:
    structure = Structure(written(tmp_path, History()))
    assert structure.headings[0] == "cats <1>" and "Loss" not in structure.headings


def test_the_page_is_rewritten_in_a_thread_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, may_write, versions = [1000.0], threading.Event(), []
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]})
    monkeypatch.setattr("library.train.report_page.time", clock)

    class Slow(ReportPage):
        def html(self, history: History, ending: Ending | None = None) -> str:
            assert may_write.wait(60)
            versions.append(ending)
            return super().html(history, ending)

    page, history = Slow(tmp_path / "cats.report.html", facts()), filled(tmp_path)
    assert page.is_old
    page.rewrite(history)
    now[0] += LEAST_PAUSE + 1
    page.rewrite(history)  # the first version is still being written
    assert versions == [] and not page.is_old
    may_write.set()
    assert page._running is not None
    page._running.result(60)
    page.rewrite(history)
    page.rewrite(history)  # too soon after the second
    page.close(history, Ending())
    assert versions == [None, None, Ending()]
    assert [path.name for path in tmp_path.glob("*.html")] == ["cats.report.html"]
    assert list(tmp_path.glob(".*")) == []


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    page = ReportPage(tmp_path / "file" / "cats.report.html", facts())
    page.rewrite(History())
    page.close(History(), Ending())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cats.report.html cannot be written" in caplog.text


def test_of_many_pictures_the_first_the_last_and_some_between_are_shown() -> None:
    pictures = [Picture(Path(f"{step}.png"), "a cat", 0, step) for step in range(100)]
    ((prompt, moments),) = chosen_moments(pictures)
    assert prompt == "a cat" and len(moments) == MOST_MOMENTS
    assert (moments[0].step, moments[-1].step) == (0, 99)


def test_a_picture_that_is_gone_is_left_out(tmp_path: Path) -> None:
    assert Thumbnails(tmp_path).data_url(Path("none.png")) is None


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.13, 0.87)[0] <= 0.13 and ticks(0.13, 0.87)[-1] >= 0.87
    assert 3 <= len(ticks(3, 1234)) <= 7


def test_one_value_and_equal_values_make_a_chart() -> None:
    for points in ([Point(1, 0.5, 0.5, 0.5)], [Point(1, 0.0, 0, 0), Point(2, 0.0, 0, 0)]):
        assert "<svg" in line_chart([Line("loss", points)], "loss")
    assert line_chart([Line("loss", [])], "loss") == ""
    assert bar_chart([], "nothing") == ""


def test_smoothing_is_the_mean_of_neighbours() -> None:
    points = [Point(i, float(i % 2), 0, 1) for i in range(100)]
    inner = [point.mean for point in smoothed(points)][10:-10]
    assert max(abs(value - 0.5) for value in inner) <= 0.1


def test_times_are_told_in_two_units() -> None:
    assert [duration(s) for s in (5, 65, 3700)] == ["5 s", "1 min 5 s", "1 h 1 min"]
    assert page_path(OutputFlags(output_dir="out", output_name="cats")) == Path("out/cats.report.html")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_chromium_shows_the_page_without_an_error(tmp_path: Path) -> None:
    written(tmp_path)
    offline = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *offline]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1200,2000"]
    command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "cats.report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1200, 2000)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50  # curves and pictures, not a blank sheet
