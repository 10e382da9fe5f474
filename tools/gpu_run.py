"""How fast are the steps of a made-up run, in how much memory, and how long do they wait for swapped weights?"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench_memory import peak_memory
from library.memory.checkpointing import Recompute
from library.memory.copier import Copier
from made_up_run import Family, MadeUpRun, Size, Variant

WARM_UP = 3
"""Steps before the clock runs, in which everything is compiled and allocated."""


@dataclass(frozen=True)
class Found:
    """What was measured."""

    seconds_per_step: float
    device_bytes: int
    """At most; 0 where the device is the CPU."""
    host_bytes: int
    """At most, of the whole process."""
    uploaded_bytes: int
    """In one step."""
    waiting: float
    """Share of a step that the device stood waiting for weights."""
    losses: tuple[float, ...]
    """Of every step, those of the warm-up first."""

    def __str__(self) -> str:
        device = f"{self.device_bytes / 1e9:.1f} GB of the device, " if self.device_bytes else ""
        uploads = f", {self.uploaded_bytes / 1e9:.3g} GB uploaded, {self.waiting:.1%} waiting"
        memory = f"{device}{self.host_bytes / 1e9:.1f} GB of main memory"
        return f"{self.seconds_per_step:.3g} s, {memory}{uploads if self.uploaded_bytes else ''}"


class TimedCopier:
    """Another copier, and how long the calculation waits for it."""

    def __init__(self, inside: Copier, is_gpu: bool) -> None:
        self.inside = inside
        self._is_gpu = is_gpu
        self._waits: list[tuple[Any, Any]] = []

    def host(self, size: int) -> Tensor:
        """Main memory."""
        return self.inside.host(size)

    def device(self, size: int) -> Tensor:
        """The device."""
        return self.inside.device(size)

    def mark(self) -> Any:
        """The moment at which the device will be done with what it has been told."""
        return self.inside.mark()

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """The moment at which the copy has arrived."""
        return self.inside.copy(source, target, after)

    def wait(self, moment: Any) -> None:
        """The calculation waits, between two marks of time."""
        before = self._now()
        self.inside.wait(moment)
        self._waits.append((before, self._now()))

    def seconds(self) -> float:
        """All waits since this was asked last; the device must have come to rest."""
        waits, self._waits = self._waits, []
        if self._is_gpu:
            return sum(before.elapsed_time(after) for before, after in waits) / 1e3
        return sum(after - before for before, after in waits)

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measured(run: MadeUpRun, steps: int, warm_up: int = WARM_UP) -> Found:
    """Take `steps` steps after those of the warm-up."""
    run.prepare_updates(warm_up + steps)
    is_gpu, streams = run.device.type == "cuda", run.room.streams
    copier = None if streams is None else TimedCopier(streams.copier, is_gpu)
    if streams is not None and copier is not None:
        streams.copier = copier
    losses = [run.step() for _ in range(warm_up)]
    rest(run.device)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    uploaded = 0 if streams is None else streams.loaded
    if copier is not None:
        copier.seconds()
    started = time.perf_counter()
    losses += [run.step() for _ in range(steps)]
    rest(run.device)
    seconds = (time.perf_counter() - started) / steps
    return Found(
        seconds_per_step=seconds,
        device_bytes=torch.cuda.max_memory_allocated(run.device) if is_gpu else 0,
        host_bytes=peak_memory(),
        uploaded_bytes=0 if streams is None else (streams.loaded - uploaded) // steps,
        waiting=0.0 if copier is None else copier.seconds() / steps / seconds,
        losses=tuple(float(loss) for loss in losses),
    )


def endured(run: MadeUpRun, steps: int) -> str:
    """What names the adapters, to the last bit, after `steps` steps."""
    run.prepare_updates(steps)
    for _ in range(steps):
        run.step()
    rest(run.device)
    digest = hashlib.sha256()
    for name, value in sorted(run.trained.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rest(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def variants(family: Family, size: Size, backend: str) -> Iterator[Variant]:
    """Every way to run that is measured."""
    for choice in itertools.product(family.forms, size.swaps, family.recompute, (False, True)):
        yield Variant(*choice, backend=backend)
    if most := size.swaps[-1]:
        for form in family.forms:
            yield Variant(form, most, Recompute.ALL, cpu_modulation=True)


def lasting_variants(family: Family, size: Size) -> list[Variant]:
    """One without swapped blocks, and those that must learn the same with them.

    Raises:
        ValueError: no blocks of this family can be swapped.
    """
    most = size.swaps[-1]
    if not most:
        raise ValueError(f"blocks of {family.title} cannot be swapped")
    return [Variant(recompute=Recompute.ALL), *(Variant("bf16", most, choice) for choice in family.recompute)]
