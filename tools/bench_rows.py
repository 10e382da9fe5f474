"""How do rows of a table of measurements come about, one by one, and what becomes of those that fail?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| measure | value | target |\n|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measure: str
    value: str
    target: str = ""

    def __str__(self) -> str:
        return f"| {self.measure} | {self.value} | {self.target} |"


class Table:
    """Rows as they come, on the console and in a file, which can be gone on with.

    Attributes:
        found: measure -> value of the rows that the file had.
    """

    def __init__(self, title: str, path: Path | None, console: TextIO) -> None:
        """`title` says what was measured on; rows of something else must not stand under it.

        Raises:
            ValueError: the file is of another commit or machine, or no such table.
        """
        self.found: dict[str, str] = {}
        self._path, self._console = path, console
        if path is not None and path.exists() and (text := path.read_text(encoding="utf-8")):
            if not text.startswith(f"{title}\n"):
                raise ValueError(f"{path} is of {text.splitlines()[0]}, and this is {title}; name another file")
            cells = (line.strip("| ").split(" | ") for line in text.splitlines()[4:])
            self.found = {row[0]: row[1] for row in cells if len(row) > 1}
            self._say(f"{title}\n\n{HEAD}", to_file=False)
        else:
            self._say(f"{title}\n\n{HEAD}")

    def add(self, row: Row) -> None:
        """Print a row, and write it before the next is measured."""
        self._say(f"{row}\n")

    def _say(self, text: str, to_file: bool = True) -> None:
        print(text, end="", file=self._console, flush=True)
        if self._path is not None and to_file:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)


def command_of(script: str, *arguments: str) -> list[str]:
    """What runs a script of this folder."""
    return [sys.executable, str(ROOT / "tools" / script), *arguments]


def run_script(script: str, *arguments: str) -> list[str]:
    """The lines that a measuring script prints; each has a process of its own, so that none sees another's memory."""
    command = command_of(script, *arguments)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script} failed, see above")
    return done.stdout.splitlines()


def rows_of_script(script: str, *arguments: str) -> Iterator[Row]:
    """The same for a script that prints rows, each when it is known."""
    command = command_of(script, *arguments)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Row(*json.loads(line))
    if process.returncode != 0:
        raise SystemExit(f"{script} failed, see above")


def outcome(command: Sequence[str], limit: float) -> str:
    """The last line that a command prints, or in a word why there is none after `limit` seconds at most."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit:.0f} s"
    if done.returncode == 0:
        return done.stdout.splitlines()[-1]
    print(done.stderr, file=sys.stderr, flush=True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "OutOfMemory" in last or "out of memory" in last:
        return "does not fit"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}; 9 is mostly main memory that ran out"
    return "failed: " + last.replace("|", "/")
