"""Where log messages go, and how they look."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from library.flags.output import LoggingFlags

FORMAT = "%(asctime)s %(levelname)-8s %(message)s  (%(filename)s:%(lineno)d)"


def print_everything() -> None:
    """What the encoding of standard output does not have is printed as an escape, instead of ending the program.

    Where output goes to another program, Windows still encodes it for one language.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def set_up_logging(flags: LoggingFlags, warnings: Sequence[str] = ()) -> None:
    """Send log messages to the console or to `--console_log_file`, and say `warnings`.

    Of several processes the first speaks; the others only report what is at least a warning, on the console.
    Called in `main()`; a second call replaces the first.
    """
    level = getattr(logging, flags.console_log_level or "INFO")
    rank = int(os.environ.get("RANK", "0"))
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if flags.console_log_file and rank == 0:
        Path(flags.console_log_file).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(flags.console_log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s" if flags.console_log_simple else FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=level if rank == 0 else max(level, logging.WARNING), handlers=[handler], force=True)
    if rank == 0:
        for warning in warnings:
            logging.getLogger(__name__).warning("%s", warning)
