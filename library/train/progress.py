"""What a run says while it runs: the line with the average loss, the log, the trackers and the report page."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from library.flags.output import OutputFlags
from library.flags.settings import Settings
from library.train.ending import Ending
from library.train.history import History, Picture
from library.train.log_file import LogFile, log_path, read_log
from library.train.pace import Pace
from library.train.report_page import ReportPage
from library.train.scalar_reader import ScalarReader
from library.train.state import Plan


class Progress:
    """The losses, rates and events of a run, told on the main process.

    A loss stays on the device while its step runs; it is read when the next one has been handed in, so that nothing
    waits for it. What is logged still carries the number of the step that it belongs to.
    """

    def __init__(
        self,
        plan: Plan,
        group_names: Sequence[str],
        accelerator: Accelerator,
        settings: Settings,
        first_step: int = 0,
        page: ReportPage | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.speaks = accelerator.is_main_process
        self.group_names = list(group_names)
        self.average = MovingAverage(plan.batches_per_epoch)
        self.pace = Pace(accelerator.device, accelerator.num_processes)
        self.timesteps = TimestepCounts()
        self.epoch = 0
        self.step = first_step
        self.history = History()
        self.page = page if self.speaks else None
        path = log_path(settings[OutputFlags]) if self.speaks else None
        if path is not None and first_step:
            self.history.replay(read_log(path, before=first_step))
        self._log_file = LogFile(path, first_step)
        self._reader = ScalarReader()
        self._gradient = ScalarReader()
        self._waiting: deque[_Update] = deque()
        self._read: list[float] = []
        self._batches = 0
        self._closed = False
        self._bar = tqdm(total=plan.steps, initial=first_step, desc="steps", smoothing=0, disable=not self.speaks)

    def start_epoch(self, epoch: int) -> None:
        """`epoch` begins, 1 for the first."""
        self.epoch = epoch

    def add_batch(self, num_images: int, timesteps: Sequence[Tensor]) -> None:
        """A batch is on its way; `timesteps` are what it drew, on the CPU."""
        self.pace.add_images(num_images)
        self.timesteps.add(timesteps)

    def add_loss(self, loss: Tensor) -> None:
        """The loss of one batch, a scalar on its device."""
        self._batches += 1
        self._take(self._reader.exchange(loss))

    def add_gradient(self, norm: Tensor) -> None:
        """The norm of the gradient of the update that follows, before it is clipped, a scalar on its device."""
        self._gradient.exchange(norm)

    def finish_update(self, step: int, optimizer: Optimizer, extra: Mapping[str, float] | None = None) -> None:
        """Optimizer step `step` is done; `extra` goes into the log beside its loss and its rates."""
        values = learning_rates(optimizer, self.group_names) | dict(extra or {}) | self.pace.finish_update()
        self._waiting.append(_Update(step, self.epoch, self._batches, values))
        self._batches = 0
        self.step = step
        self._bar.update(1)
        if self.page is not None and self.page.is_old:
            self.page.rewrite(self.history)

    def finish_epoch(self, epoch: int) -> None:
        """Log the average over the epoch that ends, its pace and the timesteps drawn so far."""
        self._take(self._reader.last())
        if self.average.count:
            self.log({"loss/epoch_average": self.average.value} | self.pace.measured(), self.step, epoch)
        if self.timesteps.total:
            self.log_table("timesteps", self.timesteps.rows(), self.step)
        self.rewrite_page()

    def log(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Send `values` to every tracker, to the log file and to the page."""
        if not self.speaks:
            return
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)
        self._log_file.write(values, step, epoch)
        self.history.add(values, step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Put a table into the log file and on the page; a later one of the same name takes its place there."""
        if self.speaks:
            self._log_file.write({"table": name, "rows": rows}, step, self.epoch)
            self.history.tables[name] = (step, [dict(row) for row in rows])

    def log_event(self, event: str, step: int, **values: Any) -> None:
        """Put something that happens once, such as a save, into the log file and on the page."""
        if self.speaks:
            self._log_file.write({"event": event, **values}, step, self.epoch)
            self.history.add_event(event, step, self.epoch, values)
            self.rewrite_page()

    def log_saves(self, names: list[str], step: int) -> None:
        """Put files whose saving has begun into the log file and on the page, and forget them."""
        for name in names:
            self.log_event("save", step, path=name)
        names.clear()

    def log_previews(self, pictures: Sequence[Picture], step: int) -> None:
        """Put previews into the log file and on the page."""
        entries = [{"path": one.path.as_posix(), "prompt": one.prompt, "index": one.index} for one in pictures]
        self.log_event("preview", step, pictures=entries)

    def aside(self) -> AbstractContextManager[None]:
        """A context for what is no part of a step, so that the time per step leaves it out."""
        return self.pace.aside()

    def rewrite_page(self) -> None:
        """Bring the page up to date, in a thread of its own."""
        if self.page is not None:
            self.page.rewrite(self.history)

    @contextmanager
    def until_closed(self) -> Iterator[None]:
        """While the context lasts the run goes on; an exception that ends it is how it ended."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.close(
                Ending("interrupted at once; what was learnt since the last saved file is lost")
                if stopped
                else Ending.failed(error)
            )
            raise
        self.close(Ending())

    def close(self, ending: Ending) -> None:
        """Log what has not been read yet, end the line and say on the page how the run ended; once."""
        if self._closed:
            return
        self._closed = True
        self._take(self._reader.last())
        self._bar.close()
        self.log_event("end", self.step, text=ending.text)
        self._log_file.close()
        if self.page is not None:
            self.page.close(self.history, ending)

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
        norm = self._gradient.last()  # known as soon as the update is done, while the next step is on its way
        if norm is not None:
            losses["norm/gradient"] = norm
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


class TimestepCounts:
    """How often timesteps were drawn, in bins of the schedule's thousand."""

    BINS = 25
    WIDTH = 1000 // BINS

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, dtype=np.int64)

    @property
    def total(self) -> int:
        """All draws of this process."""
        return int(self.counts.sum())

    def add(self, drawn: Sequence[Tensor]) -> None:
        """Count timesteps 0..999, [B] each, on the CPU."""
        for timesteps in drawn:
            bins = (timesteps.numpy() / self.WIDTH).astype(np.int64).clip(0, self.BINS - 1)
            self.counts += np.bincount(bins, minlength=self.BINS)

    def rows(self) -> list[dict[str, int]]:
        """`first` and `last` timestep of each bin, and its `count`."""
        width = self.WIDTH
        return [
            {"first": i * width, "last": (i + 1) * width - 1, "count": int(count)}
            for i, count in enumerate(self.counts)
        ]


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
