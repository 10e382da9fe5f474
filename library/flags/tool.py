"""How a tool with a few flags of its own runs: its words, its log, its exit code."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

FORMAT = "%(levelname)s: %(message)s"


def run_tool(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], words: Sequence[str] | None = None
) -> int:
    """Read `words` (the command line if None) with `parser`, do the `work` and return the exit code.

    0 when all went well; 1 when the user's files or values are at fault, which `work` says with a ValueError or an
    OSError and the log repeats without a stack trace. `--help` and unknown flags end the program as in argparse.
    """
    arguments = parser.parse_args(words)
    level = logging.DEBUG if getattr(arguments, "debug", False) else logging.INFO
    with _log_on_console(level, ("library.", "networks.", work.__module__)):
        try:
            work(arguments)
        except OSError as error:
            logger.error("%s", f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
            return 1
        except ValueError as error:
            logger.error("%s", error)
            return 1
        return 0


@contextmanager
def _log_on_console(level: int, ours: tuple[str, ...]) -> Iterator[None]:
    """Messages of loggers whose names begin with `ours` go to the error stream, others only if they warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith(ours))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


def two_numbers(text: str) -> tuple[int, int]:
    """`W,H` or `WxH`, two whole numbers above 0; a type for argparse."""
    try:
        first, second = (int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        first = second = 0
    if first < 1 or second < 1:
        raise argparse.ArgumentTypeError(f"expected two whole numbers such as 512,512, got {text!r}")
    return first, second


def at_least_one(text: str) -> int:
    """A whole number above 0; a type for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number
