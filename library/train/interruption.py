"""What the user asks of a run that is under way: Ctrl-C, SIGTERM, and the files `save` and `stop`."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from torch import distributed

from library.train.scalar_reader import ScalarReader

logger = logging.getLogger(__name__)


class Request(IntEnum):
    """What is asked for; the greater one wins when two ranks are asked different things."""

    NOTHING = 0
    SAVE = 1
    """Save now and go on."""
    STOP = 2
    """Save now and end well."""
    INTERRUPT = 3
    """Save now and end as interrupted."""

    @property
    def ends_run(self) -> bool:
        """Whether no step comes after it."""
        return self >= Request.STOP


class Requests:
    """Listens for signals and looks for files in the output folder, between the steps.

    With several processes each step's answer is the greatest of what all of them heard in the step before, read one
    step late, so that all stop after the same step and none waits for the device.
    """

    FILES = {"stop": Request.STOP, "save": Request.SAVE}

    def __init__(self, directory: Path, is_main_process: bool, device: torch.device) -> None:
        self.directory = directory
        self.is_main_process = is_main_process
        self.device = device
        self.last = Request.NOTHING
        """The answer of the last `next`."""
        self._signal = Request.NOTHING
        self._reader = ScalarReader()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the context lasts SIGINT and SIGTERM are requests; a second SIGINT is KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread alone
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def next(self) -> Request:
        """What is asked for after this step, the same on every rank."""
        heard = max(self._signal, self._look() if self.is_main_process else Request.NOTHING)
        self.last = self._agreed(heard)
        return self.last

    def _look(self) -> Request:
        """The request of a file that somebody made; the file is removed, so that it is heard once."""
        for name, request in self.FILES.items():
            path = self.directory / name
            if path.is_file():
                path.unlink(missing_ok=True)
                logger.info("%s was found: %s", path, "saving, then the run ends" if request.ends_run else "saving")
                return request
        return Request.NOTHING

    def _agreed(self, heard: Request) -> Request:
        if not (distributed.is_initialized() and distributed.get_world_size() > 1):
            return heard
        flag = torch.tensor(float(heard), device=self.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return Request(int(self._reader.exchange(flag) or 0))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._signal is Request.INTERRUPT:
            raise KeyboardInterrupt
        self._signal = Request.INTERRUPT
        logger.warning("%s: finishing the step and saving; Ctrl-C once more stops without that", name)
