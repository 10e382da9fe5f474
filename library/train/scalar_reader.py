"""How numbers come from the device to the host without a wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


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
