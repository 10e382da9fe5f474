"""What a run says while it runs: the line with the average loss, the trackers and the log file."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from library.flags.output import LoggingFlags
from library.flags.settings import Settings
from library.train.state import Plan

LOG_FILE = "log.jsonl"
"""Beside the TensorBoard folder: one JSON object per line, with `step`, `epoch`, `time` and the values."""


class Progress:
    """The losses and rates of a run, told on the main process.

    A loss stays on the device while its step runs; it is read when the next one has been handed in, so that nothing
    waits for it. What is logged still carries the number of the step that it belongs to.
    """

    def __init__(
        self, plan: Plan, group_names: Sequence[str], accelerator: Accelerator, settings: Settings, first_step: int = 0
    ) -> None:
        self.accelerator = accelerator
        self.group_names = list(group_names)
        self.average = MovingAverage(plan.batches_per_epoch)
        self.epoch = 0
        self.step = first_step
        self._log_file = LogFile(log_path(accelerator, settings[LoggingFlags]))
        self._reader = ScalarReader()
        self._waiting: deque[_Update] = deque()
        self._read: list[float] = []
        self._batches = 0
        self._bar = tqdm(
            total=plan.steps,
            initial=first_step,
            desc="steps",
            smoothing=0,
            disable=not accelerator.is_main_process,
        )

    def start_epoch(self, epoch: int) -> None:
        """`epoch` begins, 1 for the first."""
        self.epoch = epoch

    def add_loss(self, loss: Tensor) -> None:
        """The loss of one batch, a scalar on its device."""
        self._batches += 1
        self._take(self._reader.exchange(loss))

    def finish_update(self, step: int, optimizer: Optimizer, extra: Mapping[str, float] | None = None) -> None:
        """Optimizer step `step` is done; `extra` goes into the log beside its loss and its rates."""
        values = learning_rates(optimizer, self.group_names) | dict(extra or {})
        self._waiting.append(_Update(step, self.epoch, self._batches, values))
        self._batches = 0
        self.step = step
        self._bar.update(1)

    def finish_epoch(self, epoch: int) -> None:
        """Log the average over the epoch that ends."""
        self._take(self._reader.last())
        if self.average.count:
            self.log({"loss/epoch_average": self.average.value}, self.step, epoch)

    def log(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Send `values` to every tracker and to the log file."""
        if not self.accelerator.is_main_process:
            return
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)
        self._log_file.write(values, step, epoch)

    def close(self) -> None:
        """Log what has not been read yet and end the line."""
        self._take(self._reader.last())
        self._bar.close()
        self._log_file.close()

    def _take(self, loss: float | None) -> None:
        """Count a loss that has been read; the last one of an update completes its entry in the log."""
        if loss is None:
            return
        self.average.add(loss)
        self._read.append(loss)
        if not self._waiting or len(self._read) < self._waiting[0].batches:
            return
        update = self._waiting.popleft()
        current = math.fsum(self._read) / len(self._read)
        self._read.clear()
        self._bar.set_postfix(avr_loss=self.average.value, refresh=False)
        losses = {"loss/current": current, "loss/average": self.average.value}
        self.log(losses | update.values, update.step, update.epoch)


@dataclass(frozen=True)
class _Update:
    """An optimizer step whose last loss has not been read yet."""

    step: int
    epoch: int
    batches: int
    values: dict[str, float]


class MovingAverage:
    """The mean of the last `window` values: with one epoch's batches as window, each batch counts once."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=max(1, window))
        self._sum = 0.0
        self._since_exact = 0

    @property
    def count(self) -> int:
        """How many values the mean is over."""
        return len(self._values)

    @property
    def value(self) -> float:
        """The mean, 0 before the first value."""
        return self._sum / len(self._values) if self._values else 0.0

    def add(self, value: float) -> None:
        """Count `value`, and forget the oldest when the window is full."""
        oldest = self._values[0] if len(self._values) == self._values.maxlen else 0.0
        self._values.append(value)
        self._sum += value - oldest
        self._since_exact += 1
        # Once a window the sum is made anew: differences lose digits, and one infinite loss would stay in it forever.
        if self._since_exact >= len(self._values) and len(self._values) == self._values.maxlen:
            self._sum = math.fsum(self._values) if all(map(math.isfinite, self._values)) else sum(self._values)
            self._since_exact = 0


class ScalarReader:
    """Reads scalars off a device one call late, so that the host never waits for the work in front of them."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._pending: _Slot | None = None
        self._turn = 0

    def exchange(self, scalar: Tensor) -> float | None:
        """Start reading `scalar`; the answer is the one before it, None the first time."""
        if not self._slots:
            self._slots = [_Slot(scalar.device), _Slot(scalar.device)]
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        slot.start(scalar)
        previous, self._pending = self._pending, slot
        return None if previous is None else previous.read()

    def last(self) -> float | None:
        """The scalar handed in last, waiting for it; None when it has been read."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.read()


class _Slot:
    """One float of main memory that a scalar is copied to."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = torch.zeros(1, pin_memory=self._on_gpu)
        # Read through numpy: indexing a tensor for its value is what a step must not do, and is counted as such.
        self._value: np.ndarray[Any, Any] = self._buffer.numpy()
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def start(self, scalar: Tensor) -> None:
        self._buffer.copy_(scalar.detach().float().reshape(1), non_blocking=self._on_gpu)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value[0])


class LogFile:
    """A file of JSON lines, made with its first line; nothing happens without a path."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Append one line; a value that is not finite becomes null."""
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        row: dict[str, float | None] = {"step": step, "epoch": epoch, "time": round(time.time(), 3)}
        row.update((key, float(value) if math.isfinite(value) else None) for key, value in values.items())
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def log_path(accelerator: Accelerator, flags: LoggingFlags) -> Path | None:
    """Where the log file of this run lies; None without --logging_dir and on every process but the main one."""
    if not flags.logging_dir or not accelerator.is_main_process:
        return None
    return Path(accelerator.logging_dir or flags.logging_dir) / LOG_FILE


def learning_rates(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """`lr/<group>`, and `lr/d*lr/<group>` where the optimizer scales the rate by an estimate `d` of its own."""
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        name = names[index] if index < len(names) else f"group{index}"
        if group["lr"] is None:
            continue
        rates[f"lr/{name}"] = float(group["lr"])
        if group.get("d") is not None:
            rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    return rates
