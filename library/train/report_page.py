"""The report of a run: one HTML file that needs no server and nothing from outside, rewritten while the run goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from library.files.atomic import replacing
from library.flags.output import OutputFlags
from library.train.ending import Ending
from library.train.history import History, Point
from library.train.page_charts import COLOURS, Line, bar_chart, line_chart, number, smoothed
from library.train.page_pictures import Thumbnails, chosen_moments
from library.train.page_style import SCRIPT, STYLE
from library.train.run_sheet import Table

logger = logging.getLogger(__name__)

OLD_AFTER = 60.0
"""Seconds after which the page is rewritten even if nothing special has happened."""
VALIDATION = "loss/validation/"
LEAST_PAUSE = 2.0
"""Seconds between two versions, so that a run of short epochs does not do nothing else."""


@dataclass(frozen=True)
class PageFacts:
    """What does not change while the run goes."""

    name: str
    steps: int
    epochs: int
    first_step: int = 0
    settings: Sequence[Table] = ()
    tables: Sequence[Table] = ()
    buckets: Table | None = None
    warnings: Sequence[str] = field(default_factory=list)
    """A list that grows."""


class ReportPage:
    """Writes `<output_dir>/<name>.report.html` in a thread of its own, whole or not at all.

    A page that cannot be written is a warning, never the end of a run.
    """

    def __init__(self, path: Path, facts: PageFacts) -> None:
        self.path = path
        self.facts = facts
        self.started = time.time()
        self._thumbnails = Thumbnails(path.parent)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="report")
        self._running: Future[None] | None = None
        self._written = 0.0
        self._failed = False

    @property
    def is_old(self) -> bool:
        """Whether the page has not been written for a while."""
        return time.monotonic() - self._written > OLD_AFTER

    def rewrite(self, history: History) -> None:
        """Start writing the page as of now; nothing happens when it is being written, or has just been."""
        busy = self._running is not None and not self._running.done()
        if not busy and time.monotonic() - self._written > LEAST_PAUSE:
            self._written = time.monotonic()
            self._running = self._thread.submit(self._write, history, None)

    def close(self, history: History, ending: Ending) -> None:
        """Write the last version and wait for it."""
        self._thread.submit(self._write, history, ending)
        self._thread.shutdown(wait=True)

    def _write(self, history: History, ending: Ending | None) -> None:
        try:
            page = self.html(history, ending)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(page, encoding="utf-8")
        except Exception as error:  # nothing about the page may end a run
            if not self._failed:
                logger.warning("%s cannot be written: %s: %s", self.path, type(error).__name__, error)
            self._failed = True

    def html(self, history: History, ending: Ending | None = None) -> str:
        """The page as it stands, while the run goes or once it has had its `ending`."""
        sections = [
            self._summary(history, ending),
            charts(history),
            self._previews(history),
            data_section(history, self.facts),
            events_section(history),
            list_section("Warnings", list(self.facts.warnings)),
            *(section(table.title.capitalize(), grid(table)) for table in self.facts.tables),
            settings_section(self.facts.settings),
        ]
        title = escape(self.facts.name)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} - training report</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            + "\n".join(part for part in sections if part)
            + f"\n<script>{SCRIPT}</script></body></html>\n"
        )

    def _summary(self, history: History, ending: Ending | None) -> str:
        """How far the run is, and the latest of the most important numbers."""
        facts, now = self.facts, time.time()
        step = last_step(history) or facts.first_step
        share = step / max(facts.steps, 1)
        latest = {name: curve.points[-1].mean for name, curve in list(history.curves.items()) if curve.points}
        done = max(step - facts.first_step, 0)
        seconds = latest.get("time/step") or (now - self.started) / max(done, 1)
        cells = [("step", f"{step:,} of {facts.steps:,}"), ("running for", duration(now - self.started))]
        if ending is None and done:
            cells.append(("left", f"about {duration((facts.steps - step) * seconds)}"))
        wanted = {
            "loss/average": "average loss",
            "time/step": "seconds per step",
            "time/images_per_second": "images per second",
            "memory/device_peak_gb": "device memory, peak GB",
            "memory/process_gb": "main memory, GB",
        }
        cells += [(text, number(latest[name])) for name, text in wanted.items() if name in latest]
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cells)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        ended = ""
        if ending is not None:
            ended = f'<p class="ending{" failure" if ending.is_failure else ""}">{escape(ending.text)}</p>'
        more = "" if ending is not None else "; reload the page to see more"
        since = "" if ending is not None else f' data-written="{now:.0f}"'
        return (
            f'{ended}<progress max="1" value="{share:.4f}"></progress><dl class="cells">{items}</dl>'
            f'<p class="note"{since}>written {stamp}{more}</p>'
        )

    def _previews(self, history: History) -> str:
        """A line of pictures for each prompt, from the first to the last."""
        lines = []
        for prompt, moments in chosen_moments(history.pictures):
            cells = "".join(
                f'<figure><a href="{quote(picture.path.as_posix())}"><img src="{source}" alt=""></a>'
                f"<figcaption>step {picture.step:,}</figcaption></figure>"
                for picture in moments
                if (source := self._thumbnails.data_url(picture.path))
            )
            if cells:
                lines.append(f'<p class="prompt">{escape(prompt)}</p><div class="strip">{cells}</div>')
        return section("Previews", "".join(lines)) if lines else ""


def charts(history: History) -> str:
    """Loss, rates, validation, norms, time and memory over the steps."""
    curves = {name: curve.points for name, curve in list(history.curves.items())}
    loss = curves.get("loss/current", [])
    shown = [
        ("Loss", [Line("loss", loss, band=True, faint=True), Line("smoothed", smoothed(loss))]),
        ("Learning rate", _lines(curves, "lr/")),
        *_validation(curves),
        ("Norms", _lines(curves, "norm/") + _lines(curves, "max_norm/")),
        ("Seconds per step", _lines(curves, "time/step", whole=True)),
        ("Memory, GB", _lines(curves, "memory/")),
    ]
    from_zero = ("Seconds per step", "Memory, GB")
    drawn = [(title, line_chart(lines, f"{title} over the steps", title in from_zero)) for title, lines in shown]
    cards = "".join(f"<section><h2>{escape(title)}</h2>{svg}</section>" for title, svg in drawn if svg)
    cards += "".join(
        f"<section><h2>{escape(name)} (step {step:,})</h2>{shape}</section>"
        for name, (step, rows) in sorted(history.tables.items())
        if name != "timesteps" and (shape := table_of(rows))
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def data_section(history: History, facts: PageFacts) -> str:
    """Buckets, and the timesteps that were drawn."""
    parts = []
    if facts.buckets is not None and facts.buckets.rows:
        bars = [(row[0], float(row[2].replace(",", ""))) for row in facts.buckets.rows]
        inner = bar_chart(bars, "images with repeats in each bucket") + grid(facts.buckets)
        parts.append(f"<section><h2>Buckets, images with repeats</h2>{inner}</section>")
    _, rows = history.tables.get("timesteps", (0, []))
    if rows:
        bars = [(f"{row['first']}-{row['last']}", float(row["count"])) for row in rows]
        chart = bar_chart(bars, "how often each range of timesteps was drawn")
        parts.append(f"<section><h2>Timesteps drawn</h2>{chart}</section>")
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def table_of(rows: Sequence[dict[str, Any]], most: int = 50) -> str:
    """Rows of a table of the log; a number stands behind a bar of its size."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = []
    for row in rows[:most]:
        cells = (row.get(name) for name in names)
        lines.append("".join(f"<td{_kind(cell)}>{escape(cell_text(cell))}</td>" for cell in cells))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    more = f'<p class="note">{len(rows) - most} more lines in the log</p>' if len(rows) > most else ""
    chart = _bins_chart(rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'{chart}<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{more}'


def events_section(history: History) -> str:
    """Saves and whatever else happened once; previews have a section of their own."""
    events = [event for event in list(history.events) if event["event"] != "preview"]
    rows = []
    for event in events:
        values = {key: value for key, value in event.items() if key not in ("event", "step", "epoch")}
        text = ", ".join(
            cell_text(value) if key in ("path", "text") else f"{key} {cell_text(value)}"
            for key, value in values.items()
        )
        rows.append((f"{event['step']:,}", str(event["event"]), text))
    return section("Events", grid(Table("", ("step", "what", ""), tuple(rows)))) if rows else ""


def list_section(title: str, texts: Iterable[str]) -> str:
    """A list of texts."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return section(title, f"<ul>{items}</ul>") if items else ""


def settings_section(tables: Sequence[Table]) -> str:
    """The settings in force, group by group."""
    if not tables:
        return ""
    cards = "".join(f"<div><h3>{escape(table.title)}</h3>{grid(table)}</div>" for table in tables)
    note = '<p class="note">Bold settings differ from the default; what is off is left out.</p>'
    return section("Settings in force", f'{note}<div class="columns">{cards}</div>')


def section(title: str, inner: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def grid(table: Table) -> str:
    """A table; marked lines stand out."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = []
    for i, row in enumerate(table.rows):
        marked = ' class="marked"' if i in table.marked else ""
        rows.append(f"<tr{marked}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    heading = f"<tr>{head}</tr>" if any(table.head) else ""
    return f'<div class="scroll"><table>{heading}{"".join(rows)}</table></div>'


def last_step(history: History) -> int:
    """The last step of any curve; 0 before the first."""
    return max((curve.points[-1].step for curve in list(history.curves.values()) if curve.points), default=0)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that are not 0."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole % 60} s"


def cell_text(value: Any) -> str:
    """A value of the log as text."""
    if value is None:
        return "not finite"
    return number(value) if isinstance(value, float) else str(value)


def _validation(curves: dict[str, list[Point]]) -> list[tuple[str, list[Line]]]:
    """Averages, each timestep, and the distance from the training loss are curves of different sizes."""
    own = {name.removeprefix(VALIDATION): points for name, points in curves.items() if name.startswith(VALIDATION)}
    timesteps = sorted((name for name in own if name[1:].isdecimal()), key=lambda name: int(name[1:]))
    apart = [name for name in own if name.endswith("divergence")]
    averages = [name for name in own if name not in timesteps and name not in apart]
    parts = {
        "Validation loss": averages,
        "Validation loss by timestep": timesteps,
        "Validation loss less training loss": apart,
    }
    return [(title, [Line(name, own[name]) for name in names[:COLOURS]]) for title, names in parts.items()]


def _kind(value: Any) -> str:
    return ' class="number"' if isinstance(value, int | float) else ""


def _lines(curves: dict[str, list[Point]], start: str, whole: bool = False) -> list[Line]:
    names = [name for name in curves if (name == start if whole else name.startswith(start))]
    return [Line(name if whole else name.removeprefix(start), curves[name]) for name in names[:COLOURS]]


def _bins_chart(rows: Sequence[dict[str, Any]]) -> str:
    """Bars when the rows are ranges of timesteps with a loss each."""
    bars = [
        (f"{row['first']}-{row['last']}", float(row["loss"]))
        for row in rows
        if {"first", "last", "loss"} <= row.keys() and isinstance(row["loss"], int | float)
    ]
    return bar_chart(bars, "loss in each range of timesteps")


def page_path(flags: OutputFlags) -> Path:
    """`<output_dir>/<output_name or last>.report.html`."""
    return Path(flags.output_dir or ".") / f"{flags.output_name or 'last'}.report.html"
