"""How fast a run goes and how much memory it holds, told every few steps without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

EVERY = 10
"""Updates between two answers."""
GIGABYTE = 1e9
COUNTS_MEMORY = ("cuda", "xpu")
"""Kinds of device whose allocator says how much it holds."""


class Pace:
    """Seconds per optimizer step and images per second, over the last `EVERY` steps, and memory in GB.

    The host's clock is enough: the loss is read one step late, so the host is never more than a step ahead.
    """

    def __init__(self, device: torch.device, num_processes: int) -> None:
        self.device = device
        self.num_processes = num_processes
        self._process = psutil.Process()
        self._images = 0
        self._updates = 0
        self._since: float | None = None

    def add_images(self, count: int) -> None:
        """A batch of `count` images is on its way."""
        if self._since is None:
            self._since = time.perf_counter()
        self._images += count

    def finish_update(self) -> dict[str, float]:
        """What the log says after this update; empty but for every tenth."""
        self._updates += 1
        return self.measured() if self._updates % EVERY == 0 else {}

    def measured(self) -> dict[str, float]:
        """The pace since the last answer, and the memory now; empty when no update was finished since."""
        if self._since is None or not self._updates:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values = {
            "time/step": seconds / self._updates,
            "time/images_per_second": self._images * self.num_processes / seconds,
        }
        self._since, self._updates, self._images = time.perf_counter(), 0, 0
        return values | self.memory()

    def memory(self) -> dict[str, float]:
        """GB of this process in main memory, and on the device now and at most so far."""
        values = {"memory/process_gb": self._process.memory_info().rss / GIGABYTE}
        if self.device.type in COUNTS_MEMORY:
            module = torch.get_device_module(self.device)
            values["memory/device_gb"] = module.memory_allocated(self.device) / GIGABYTE
            values["memory/device_peak_gb"] = module.max_memory_allocated(self.device) / GIGABYTE
        return values

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside, such as previews, counts as no step's time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - started
