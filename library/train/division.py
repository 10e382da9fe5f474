"""An optimizer whose state is divided among the processes: which part is whose, and how all come to the first one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

CHUNK = 1 << 26
"""Bytes of one message, since those for a GPU lie on it while they are on their way."""


@dataclass(frozen=True)
class Division:
    """This process has part `rank` of `ranks`, and no other holds it."""

    way: str
    """The flag that divides the state."""
    ranks: int
    rank: int
    device: torch.device
    """Where messages between the processes lie."""

    @property
    def file(self) -> str:
        """The name of this process's part in a state folder."""
        return file_names(self.ranks)[self.rank]

    def gather(self, part: Mapping[str, Any]) -> dict[str, Tensor]:
        """File name -> content of every part, on the first rank, and nothing on the others; all ranks call this."""
        content = io.BytesIO()
        torch.save(part, content)
        own = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
        return dict(zip(file_names(self.ranks), to_first_rank(own, self.device)))


def file_names(ranks: int) -> list[str]:
    """What the parts of `ranks` processes are called in a state folder."""
    return [f"optimizer-{number}-of-{ranks}.bin" for number in range(1, ranks + 1)]


def described(way: str | None, ranks: int) -> str:
    """How a state is divided, as the user says it."""
    return "whole" if way is None else f"divided by {way} among {ranks} process{'' if ranks == 1 else 'es'}"


def to_first_rank(own: Tensor, device: torch.device) -> list[Tensor]:
    """The bytes [N] of every rank, of any length and in main memory, on the first rank; none on the others."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [own]
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    sizes = torch.zeros(ranks, dtype=torch.int64, device=device)
    sizes[rank] = len(own)
    distributed.all_reduce(sizes)
    if rank > 0:
        for chunk in own.split(CHUNK):
            distributed.send(chunk.to(device), dst=0)
        return []
    gathered = [own]
    for source, size in enumerate(sizes.tolist()[1:], start=1):
        gathered.append(torch.empty(size, dtype=torch.uint8))
        for chunk in gathered[-1].split(CHUNK):
            arriving = torch.empty_like(chunk, device=device)
            distributed.recv(arriving, src=source)
            chunk.copy_(arriving)
    return gathered
