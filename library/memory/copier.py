"""Copies between main memory and a device that run beside the calculation, ordered by events alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Copier(Protocol):
    """Moves bytes; its only clock are events, which it hands out and takes back."""

    def host(self, size: int) -> Tensor:
        """`size` bytes of main memory that copies can reach without a stop."""
        ...

    def device(self, size: int) -> Tensor:
        """`size` bytes on the device."""
        ...

    def mark(self) -> Any:
        """The moment at which everything that the device has been told to do until now is done."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Copy bytes once the moment `after` has come, beside what the device does; the moment they have arrived."""
        ...

    def wait(self, moment: Any) -> None:
        """Let what the device is told from now on begin after `moment`."""
        ...


class CudaCopier:
    """Pinned memory and one stream of its own; the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self._device)

    def host(self, size: int) -> Tensor:
        """One allocation of just this size where the driver pins what is there already, or else one of torch's."""
        pinned = torch.empty(size, dtype=torch.uint8)
        # torch's own pinned allocations are rounded up to a power of two.
        if size and torch.cuda.cudart().cudaHostRegister(pinned.data_ptr(), size, 0).value == 0:
            return pinned
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def device(self, size: int) -> Tensor:
        """-> uint8 [size]"""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """An event on the stream of the calculation."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, source: Tensor, target: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """The answer is an event on the stream of the copies."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            for tensor in (source, target):
                if tensor.is_cuda:  # its memory must not be given to another before the copy is done
                    tensor.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def wait(self, moment: torch.cuda.Event) -> None:
        """The stream of the calculation waits, the host does not."""
        torch.cuda.current_stream(self._device).wait_event(moment)


class PlainCopier:
    """The same on the CPU, where a copy has arrived when it is made."""

    def host(self, size: int) -> Tensor:
        """-> uint8 [size]"""
        return torch.empty(size, dtype=torch.uint8)

    def device(self, size: int) -> Tensor:
        """-> uint8 [size]"""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> None:
        """Now."""

    def copy(self, source: Tensor, target: Tensor, after: Any) -> None:
        """At once."""
        target.copy_(source)

    def wait(self, moment: Any) -> None:
        """It has passed."""


class ElsewhereCopier(PlainCopier):
    """Main memory is somewhere else and what lies there is not looked at: for estimates of what the device holds."""

    def host(self, size: int) -> Tensor:
        """Without content."""
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def copy(self, source: Tensor, target: Tensor, after: Any) -> None:
        """Nothing."""


def make_copier(device: torch.device) -> Copier:
    """The copier for `device`.

    Raises:
        ValueError: weights cannot be streamed to devices of its kind.
    """
    if device.type == "cuda":
        return CudaCopier(device)
    if device.type == "cpu":
        return PlainCopier()
    raise ValueError(f"--blocks_to_swap needs a CUDA device (or the CPU, to try it out), not {device.type}")
