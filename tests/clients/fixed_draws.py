"""A trainer in which noise and timesteps belong to the image, so that runs with other numbers of processes compare."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from library.data.dataset import TrainingSet
from library.data.items import Batch, BatchRequest
from library.diffusion.process import Draws, Noised, Process
from library.files.weights import save_safetensors
from tests.clients.training import SmallTrainer


class FixedNoise:
    """The process of the run, with draws that depend on the path of each image alone."""

    def __init__(self, inner: Process, paths: list[str]) -> None:
        self.inner = inner
        self.paths = paths

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def add_noise(self, latents: Tensor, draws: Draws, t: float | None = None) -> Noised:
        """Row by row."""
        rows = []
        for path, row in zip(self.paths, latents.split(1), strict=True):
            seed = int.from_bytes(hashlib.blake2b(Path(path).name.encode(), digest_size=4).digest(), "big")
            rows.append(self.inner.add_noise(row, Draws.seeded(seed), t))
        x, times, noise = (torch.cat([getattr(row, name) for row in rows]) for name in ("x", "t", "noise"))
        return Noised(x, times, noise)


class FixedOrder:
    """Batches in which the images of step n are always the same, shared out among the processes."""

    def __init__(self, data: TrainingSet, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size

    def epoch(self, epoch: int, *where: object) -> Iterator[Batch]:
        """Images 2n and 2n + 1 in step n: one for each of two processes, both for a single one."""
        count = len(self.data.datasets[0].items)
        for first in range(0, count, 2):
            pair = range(first, first + 2)
            mine = tuple(pair[self.rank :: self.world_size])
            yield self.data[BatchRequest(0, mine, (0,) * len(mine), epoch, step=0, total_steps=1)]


class FixedDraws(SmallTrainer):
    """Trains on the same images and noise with one process or two, and writes what every rank ends with."""

    def prepare(self) -> None:
        """As always, with the fixed order of batches."""
        super().prepare()
        processes = self.accelerator
        self.loader = FixedOrder(self.data, processes.process_index, processes.num_processes)  # type: ignore[assignment]

    def backward(self, batch: Batch, completes: bool) -> Tensor:
        """With the noise of the images."""
        process = self.arch.process
        self.arch.process = FixedNoise(process, batch.paths)  # type: ignore[assignment]
        try:
            return super().backward(batch, completes)
        finally:
            self.arch.process = process

    def finish(self) -> None:
        """The weights of this rank, for the test."""
        rank, folder = os.environ.get("RANK", "0"), Path(self.settings.values()["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(self.trained.network.state_dict_for_saving(), folder / f"rank{rank}.safetensors", {})
        super().finish()
