"""The log of a run as a file: one JSON object per line, beside the result, always."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from library.flags.output import OutputFlags

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


class LogFile:
    """A file of JSON lines, made with its first line; nothing happens without a path.

    A run that starts anew keeps the log of the run before it as `<name>.log.previous.jsonl`; one that continues, with
    `first_step` above 0, goes on in the same file after a line that says where.
    """

    def __init__(self, path: Path | None, first_step: int = 0) -> None:
        self.path = path
        self.first_step = first_step
        self._file: IO[str] | None = None

    def write(self, values: Row, step: int, epoch: int) -> None:
        """Append one line with `step`, `epoch`, `time` (seconds since 1970) and `values`.

        A number that is not finite becomes null, inside of lists and tables too.
        """
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = self._opened(self.path, epoch)
            self._append(values, step, epoch)
        except OSError as error:
            logger.warning("%s is not written any more: %s; the run goes on without it", self.path, error)
            self.path = None
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # what is left in the buffer may not fit either
                self._file.close()
            self._file = None

    def _opened(self, path: Path, epoch: int) -> IO[str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        continues = self.first_step > 0
        if path.exists() and not continues:
            os.replace(path, previous_log(path))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if continues:
            self._append({"event": "resume"}, self.first_step, epoch)
        return self._file

    def _append(self, values: Row, step: int, epoch: int) -> None:
        assert self._file is not None
        row = {"step": step, "epoch": epoch, "time": round(time.time(), 3)}
        row.update((key, finite(value)) for key, value in values.items())
        self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")


def log_path(flags: OutputFlags) -> Path | None:
    """`<output_dir>/<output_name or last>.log.jsonl`; None without an output folder."""
    return None if flags.output_dir is None else Path(flags.output_dir) / f"{flags.output_name or 'last'}.log.jsonl"


def previous_log(path: Path) -> Path:
    """Where the log of the run before goes."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".previous.jsonl")


def read_log(path: Path, before: int) -> Iterator[dict[str, Any]]:
    """The lines of a log as far as a run that continues after step `before` builds on them.

    What an earlier continuation did again is left out, and so is a last line that was cut off by a kill.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return iter(())
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        if row.get("event") == "resume":
            rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
        rows.append(row)
    return iter([row for row in rows if row["step"] <= before])


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become None."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [finite(part) for part in value]
    return str(value)
