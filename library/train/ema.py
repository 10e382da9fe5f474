"""The moving average of what is trained, which often makes better pictures than the last step does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingWeights:
    """An exponential moving average over weights, best in flat buffers (Polyak averaging).

    The share of the old average is `decay`, and less in the first steps, (1 + n) / (10 + n) after n updates, so that
    a short run is not an average over its own beginning. One `lerp` per buffer and update; nothing waits for the
    device.
    """

    def __init__(self, values: Sequence[Tensor], decay: float) -> None:
        self.values = list(values)
        self.averages = [tensor.detach().clone() for tensor in self.values]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        self.updates += 1
        share = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, value in zip(self.averages, self.values, strict=True):
            average.lerp_(value, 1 - share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the context lasts the weights are their averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, Tensor]:
        """What a saved state keeps: the buffers by number, and how many updates they have seen."""
        averages = {f"buffer{number}": average for number, average in enumerate(self.averages)}
        return averages | {"updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`; ValueError when it is of other weights."""
        mine, found = self._sizes(self.state()), self._sizes(state)
        if mine != found:
            there, here = sum(map(math.prod, found)), sum(map(math.prod, mine))
            raise ValueError(
                f"the saved moving average is of other weights: {len(found)} tensors with {there:,} numbers, "
                f"where the run has {len(mine)} with {here:,}"
            )
        for number, average in enumerate(self.averages):
            average.copy_(state[f"buffer{number}"])
        self.updates = int(state["updates"])

    @staticmethod
    def _sizes(state: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """The shapes of the buffers in their order; a file may hold them in another one."""
        return [tuple(state[f"buffer{number}"].shape) for number in range(len(state) - 1)]

    def restart(self) -> None:
        """Begin anew with the weights as they are now."""
        self.updates = 0
        for average, value in zip(self.averages, self.values, strict=True):
            average.copy_(value.detach())

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weights and averages change places, one buffer at a time, so that no more than one is there twice."""
        for value, average in zip(self.values, self.averages, strict=True):
            kept = value.detach().clone()
            value.copy_(average)
            average.copy_(kept)
