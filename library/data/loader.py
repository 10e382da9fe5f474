"""Who makes which batch, and when: the share of each rank, worker processes, look-ahead."""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.dataset import TrainingSet
from library.data.items import Batch, BatchRequest

logger = logging.getLogger(__name__)

LOOK_AHEAD = 4
"""Batches that the thread prepares before they are asked for."""


@dataclass(frozen=True)
class BatchOrder:
    """Which batches a rank uses in an epoch. Together the ranks use every batch once.

    Where the batches run out before the ranks do, the last round is filled up with batches of weight 0, and the
    weights of the real ones rise so that the mean over the ranks is the mean over the real batches.
    """

    training_set: TrainingSet
    seed: int
    rank: int = 0
    world_size: int = 1
    total_steps: int = 1
    """Optimizer steps of the whole run."""
    accumulation: int = 1
    """Batches of this rank in one optimizer step."""

    def __len__(self) -> int:
        """Batches of an epoch, the same for every rank."""
        return -(-self.training_set.num_batches // self.world_size)

    def requests(self, epoch: int, first_step: int, start_batch: int = 0) -> list[BatchRequest]:
        """This rank's requests for `epoch` (from 1), from its batch `start_batch` on.

        `first_step` is the number of optimizer steps done when the epoch began, also when it is resumed inside.
        """
        return list(self.upcoming(epoch, first_step, start_batch))

    def upcoming(self, epoch: int, first_step: int, start_batch: int = 0) -> Iterator[BatchRequest]:
        """`requests` one by one."""
        planned = self.training_set.epoch_batches(self.seed, epoch)
        for index in range(start_batch, len(self)):
            first = index * self.world_size
            place = first + self.rank
            num_real = min(len(planned) - first, self.world_size)
            batch = planned[place % len(planned)]
            yield BatchRequest(
                dataset=batch.dataset,
                items=batch.items,
                draws=batch.draws,
                epoch=epoch,
                step=first_step + index // self.accumulation,
                total_steps=self.total_steps,
                weight=self.world_size / num_real if place < len(planned) else 0.0,
            )


@dataclass
class Loader:
    """Batches of one rank, made by worker processes, or by a thread when latents are cached."""

    order: BatchOrder
    workers: int = 0
    persistent: bool = False
    pin_memory: bool = False
    _requests: _Requests = field(default_factory=lambda: _Requests(), repr=False)
    _processes: DataLoader[Batch | Failure] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    def epoch(self, epoch: int, first_step: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 1); the same for any number of workers. Arguments as `BatchOrder.requests`."""
        if self.order.training_set.latents_cached:
            return self._from_thread(self.order.upcoming(epoch, first_step, start_batch))
        if self.workers == 0:
            return self._from_here(self.order.upcoming(epoch, first_step, start_batch))
        return self._from_processes(self.order.requests(epoch, first_step, start_batch))

    def _from_here(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        for request in requests:
            yield self._make(request)

    def _from_thread(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Reading cached latents takes so little that a thread does, and an epoch begins without delay."""
        pending: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            for request in requests:
                pending.append(pool.submit(self._make, request))
                if len(pending) > LOOK_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, request: BatchRequest) -> Batch:
        batch = self.order.training_set[request]
        return batch.pin_memory() if self.pin_memory else batch

    def _from_processes(self, requests: list[BatchRequest]) -> Iterator[Batch]:
        self._requests.current = requests
        # Here and not only in the workers: one that is forked hangs or crashes when it stops threads of OpenCV that
        # only its parent has.
        cv2.setNumThreads(1)
        if self._processes is None:
            self._processes = DataLoader(
                _Answers(self.order.training_set),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                persistent_workers=self.persistent,
                pin_memory=self.pin_memory,
                worker_init_fn=_start_worker,
                # Without one of its own it would draw from the generator that the training step uses.
                generator=torch.Generator(),
            )
        for answer in self._processes:
            if isinstance(answer, Failure):
                raise ValueError(answer.message)
            yield answer


def make_loader(
    training_set: TrainingSet,
    *,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    persistent: bool,
    total_steps: int,
    accumulation: int,
    pin_memory: bool,
) -> Loader:
    """The batches of `rank`; at most `workers` processes, and never more than there are other cores."""
    order = BatchOrder(training_set, seed, rank, world_size, total_steps, accumulation)
    processes = max(min(workers, (os.cpu_count() or 1) - 1), 0)
    return Loader(order, processes, persistent and processes > 0, pin_memory)


@dataclass(frozen=True)
class Failure:
    """A mistake in the user's images, brought home from a worker without its stack trace."""

    message: str


class _Requests(Sampler[BatchRequest]):
    """What persistent workers are asked next; the loader fills it before each epoch."""

    def __init__(self) -> None:
        self.current: list[BatchRequest] = []

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)


class _Answers(Dataset["Batch | Failure"]):
    """The training set as a worker sees it."""

    def __init__(self, training_set: TrainingSet) -> None:
        self.training_set = training_set

    def __getitem__(self, request: BatchRequest) -> Batch | Failure:
        try:
            return self.training_set[request]
        except (ValueError, OSError) as error:
            return Failure(str(error))


def _start_worker(number: int) -> None:
    """The workers are the parallelism; OpenCV's own threads would only get in their way.

    Ctrl-C reaches every process of a terminal, and what becomes of the run is for the main process to say.
    """
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
