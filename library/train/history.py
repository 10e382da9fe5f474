"""What a run has said so far, in bounded memory, for the report page."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_POINTS = 600
"""Points a curve keeps: as many as a wide screen can show."""
MOST_EVENTS = 400
MOST_WARNINGS = 60
NOT_CURVES = frozenset(["step", "epoch", "time", "event", "table", "rows"])


@dataclass
class Point:
    """Some neighbouring values of a curve, as one."""

    step: int
    """The last one's."""
    mean: float
    low: float
    high: float


class Series:
    """One curve. When it has too many points, neighbours are joined, so that all of it stays in sight."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._stride = 1
        self._points: list[Point] = []
        self._open: list[float] = []
        self._step = 0

    @property
    def points(self) -> list[Point]:
        """The curve from the first step to the last; what is not finite has no place in it."""
        points = list(self._points)
        values = list(self._open)
        return [*points, _joined(self._step, values)] if values else points

    def add(self, step: int, value: float) -> None:
        """Go on with `value`."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        self._step = step
        if len(self._open) < self._stride:
            return
        self._points.append(_joined(step, self._open))
        self._open = []
        if len(self._points) >= self._most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_pair(*pair) for pair in pairs]
            self._stride *= 2


@dataclass
class Picture:
    """One preview."""

    path: Path
    """Relative to the output folder."""
    prompt: str
    index: int
    """Place of its prompt in the file of prompts."""
    step: int = 0


@dataclass
class History:
    """Curves, tables, events, previews and warnings of one run."""

    curves: dict[str, Series] = field(default_factory=dict)
    tables: dict[str, tuple[int, list[dict[str, Any]]]] = field(default_factory=dict)
    """Name -> the step of its last version, and its rows."""
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    pictures: list[Picture] = field(default_factory=list)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Values of one step, one for each curve."""
        for name, value in values.items():
            curve = self.curves.get(name)
            if curve is None:
                curve = self.curves[name] = Series()
            curve.add(step, value)

    def add_event(self, event: str, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Something that happened once, such as a save."""
        self.events.append({"event": event, "step": step, "epoch": epoch, **values})
        if event == "preview":
            self.pictures += [
                Picture(Path(entry["path"]), entry["prompt"], entry["index"], step) for entry in values["pictures"]
            ]

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what the log of the first part of a run says."""
        for row in rows:
            step, epoch = row["step"], row.get("epoch", 0)
            if "event" in row:
                values = {key: value for key, value in row.items() if key not in NOT_CURVES}
                self.add_event(row["event"], step, epoch, values)
            elif "table" in row:
                self.tables[row["table"]] = (step, list(row["rows"]))
            else:
                numbers = {key: value for key, value in row.items() if key not in NOT_CURVES}
                self.add({key: value for key, value in numbers.items() if isinstance(value, int | float)}, step)


class WarningList(logging.Handler):
    """The first messages of at least a warning, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of `record`."""
        message = record.getMessage()
        if message not in self.messages and len(self.messages) < MOST_WARNINGS:
            self.messages.append(message)


@contextmanager
def warnings_kept(earlier: Sequence[str] = ()) -> Iterator[list[str]]:
    """While the context lasts, every warning that is logged also goes into the list it gives."""
    handler = WarningList()
    handler.messages.extend(earlier)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler.messages
    finally:
        root.removeHandler(handler)


def _joined(step: int, values: Sequence[float]) -> Point:
    return Point(step, math.fsum(values) / len(values), min(values), max(values))


def _pair(first: Point, second: Point) -> Point:
    return Point(second.step, (first.mean + second.mean) / 2, min(first.low, second.low), max(first.high, second.high))
