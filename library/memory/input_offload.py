"""The inputs of recomputed blocks, kept in main memory until backward comes to them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from library.memory.copier import Copier

SMALLEST = 1 << 20
"""Bytes; what is smaller stays on the device, since a copy would cost more than it saves."""


class _Ticket:
    """One tensor that is away."""

    def __init__(self, tensor: Tensor, host: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.host: Tensor | None = host
        self.back: Tensor | None = None
        self.arrival: Any = None


class InputOffload:
    """Copies go out and come back on a stream of their own; the tensor needed next is fetched ahead.

    Buffers in main memory are used again from step to step.

    Attributes:
        moved: bytes copied out until now.
    """

    def __init__(self, copier: Copier, smallest: int = SMALLEST) -> None:
        self.moved = 0
        self._copier = copier
        self._smallest = smallest
        self._free: dict[int, list[Tensor]] = {}
        self._away: list[weakref.ref[_Ticket]] = []

    def of(self, inputs: Sequence[Any]) -> AbstractContextManager[Any]:
        """While the context lasts, those of `inputs` that are activations leave the device when they are saved.

        What needs no gradient, such as tables of positions, is shared by all blocks and stays.
        """
        wanted = {
            value.untyped_storage()._cdata
            for value in inputs
            if isinstance(value, Tensor) and value.requires_grad and value.nbytes >= self._smallest
        }

        def pack(tensor: Tensor) -> Tensor | _Ticket:
            return self._send(tensor) if tensor.untyped_storage()._cdata in wanted else tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, self._fetched)

    def _send(self, tensor: Tensor) -> _Ticket:
        free = self._free.setdefault(tensor.nbytes, [])
        ticket = _Ticket(tensor, free.pop() if free else self._copier.host(tensor.nbytes))
        assert ticket.host is not None
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self._copier.copy(flat, ticket.host, self._copier.mark())
        self.moved += tensor.nbytes
        self._away = [kept for kept in self._away if kept() is not None]  # a graph may end without backward
        self._away.append(weakref.ref(ticket))
        return ticket

    def _fetched(self, kept: Tensor | _Ticket) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._bring(kept)
        self._away = [other for other in self._away if (ticket := other()) is not None and ticket.back is None]
        if self._away and (following := self._away[-1]()) is not None:  # the block that is recomputed next
            self._bring(following)
        self._copier.wait(kept.arrival)
        assert kept.back is not None
        return kept.back.view(kept.dtype).view(kept.shape)

    def _bring(self, ticket: _Ticket) -> None:
        if ticket.back is not None:
            return
        assert ticket.host is not None
        ticket.back = torch.empty(ticket.host.numel(), dtype=torch.uint8, device=ticket.device)
        ticket.arrival = self._copier.copy(ticket.host, ticket.back, self._copier.mark())
        # Whatever is copied into it next is copied by the same stream, after this.
        self._free.setdefault(ticket.host.numel(), []).append(ticket.host)
        ticket.host = None
