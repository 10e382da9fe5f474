"""The thin matrices of a layer that is several in one: a pair for each of its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.joining import block_diagonal


class Parted(nn.ModuleList, ABC):
    """Linear layers without bias whose weights are joined into one; keys `0.weight`, `1.weight`, ...

    A joined weight in a state dict is taken apart again.
    """

    def __init__(self, layers: Sequence[nn.Linear], rank: int, rows: Sequence[int]) -> None:
        super().__init__(layers)
        self.rank = rank
        self.rows = list(rows)

    @property
    def weight(self) -> Tensor:
        """The joined weight."""
        return self.join(list(self.parameters()))

    @abstractmethod
    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights of all parts as one; their gradients likewise."""

    @abstractmethod
    def parts_of(self, joined: Tensor) -> list[Tensor]:
        """The weights of the parts, of which `joined` was made."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        joined = state_dict.pop(f"{prefix}weight", None)
        errors: list[str] = rest[-1]
        if joined is not None and joined.shape != self.weight.shape:
            shapes = f"{list(joined.shape)} instead of {list(self.weight.shape)}"
            errors.append(f"{prefix}weight: {shapes}, of {len(self)} parts of rank {self.rank} each")
        elif joined is not None:
            parts = self.parts_of(joined)
            if not torch.equal(self.join(parts), joined):
                errors.append(f"{prefix}weight is of one layer, and was not trained as {len(self)} (split_qkv)")
            state_dict |= {f"{prefix}{number}.weight": part for number, part in enumerate(parts)}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class StackedDown(Parted):
    """The parts' `down` below each other: each [r, C] -> [n r, C]."""

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(weights))

    def parts_of(self, joined: Tensor) -> list[Tensor]:
        return list(joined.split(self.rank))


class DiagonalUp(Parted):
    """The parts' `up` along a diagonal: each [O_i, r] -> [sum O, n r]."""

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return block_diagonal(weights, self.rows)

    def parts_of(self, joined: Tensor) -> list[Tensor]:
        blocks = zip(joined.split(self.rows), range(0, joined.shape[1], self.rank))
        return [block[:, column : column + self.rank] for block, column in blocks]


class JoinedWeight(Mapping[str, Tensor]):
    """Looks like the parameters of a layer with one `weight`, which it joins whenever it is asked for it."""

    def __init__(self, layer: Parted) -> None:
        self._layer = layer

    def __getitem__(self, key: str) -> Tensor:
        assert key == "weight"
        return self._layer.weight

    def __iter__(self) -> Iterator[str]:
        return iter(("weight",))

    def __len__(self) -> int:
        return 1
