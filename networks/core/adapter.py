"""What adapters of every kind have in common, and how they come to stand in the place of the layers they adapt."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dropout:
    """What is left out at random while training; 0 is nothing."""

    neuron: float = 0.0
    """Probability that one value is zeroed: of a LoRA between down and up, of other kinds in what they add."""
    rank: float = 0.0
    """Probability that one rank of one sample is zeroed; of kinds other than LoRA, one channel of what they add."""
    module: float = 0.0
    """Probability that a whole adapter sits out a step."""


@dataclass
class Strength:
    """How strongly the adapters of one network act; all of them share one."""

    multiplier: float = 1.0
    rows: Tensor | None = None
    """[B] one more factor for each sample of a batch."""
    enabled: bool = True


class Adapter(nn.Module, ABC):
    """Changes one layer; what it adds to the layer's answer grows linearly with the multiplier.

    Attributes:
        rank: what --network_dim was for this layer; what it means is the kind's affair.
        scale: what the product of its parameters is multiplied with.
        frozen: is not trained.
        resting: takes no part, as if it were not there.
        skipped: sits out the running step of training.
        loaded: its weights came from a file.
    """

    alpha: Tensor
    stand_ins: ClassVar[tuple[type[nn.Module], type[nn.Module]]]
    """What stands in the place of a linear layer, and of a convolution."""

    def __init__(self, rank: int, scale: float, dropout: Dropout, strength: Strength) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.strength = strength
        self.drops = dropout.neuron > 0 or dropout.rank > 0
        self.frozen = False
        self.resting = False
        self.skipped = False
        self.loaded = False

    @abstractmethod
    def file_tensors(self) -> dict[str, Tensor]:
        """What belongs in a file, by the end of its key."""

    @abstractmethod
    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: what learns at the plain rate, and what LoRA+ lets learn faster."""

    @abstractmethod
    def hold(self, base: Any) -> Mapping[str, Any]:
        """The attributes of the layer that stands in the place of `base`, besides those of `base` itself."""

    def norm(self) -> Tensor | None:
        """The Frobenius norm of what is added to the weight, a scalar; None where a norm has no meaning."""
        return None

    def shrinking(self) -> tuple[list[nn.Parameter], int]:
        """The parameters that make up the norm, and of how many factors the product is that they are in."""
        parameters = [*self.halves()[0], *self.halves()[1]]
        return parameters, len(parameters)

    def factor(self) -> float:
        """What the product of the parameters is multiplied with now; 0 when it need not be computed."""
        if self.resting or not self.strength.enabled or (self.skipped and self.training):
            return 0.0
        return self.scale * self.strength.multiplier

    @property
    def draws(self) -> bool:
        """Whether `start_step` draws."""
        return self.dropout.module > 0

    def start_step(self, random: random.Random) -> None:
        """Draw what is left out in the step that begins."""
        if self.dropout.module > 0:
            self.skipped = random.random() < self.dropout.module

    def follow_gradient(self) -> None:
        """Look at the final gradient of a step."""

    @property
    def file_rank(self) -> int:
        """The rank that a file of it shows."""
        return self.rank

    def channel_scale(
        self, samples: int, between: tuple[int, ...], channel_dim: int, channels: int, x: Tensor
    ) -> Tensor | None:
        """The factors of what the adapter computes, or None for ones: the factor of each sample and dropout masks.

        `between` is the shape without the samples and the channels, which are dimension `channel_dim`; `x` has the
        dtype and the device.
        """
        mask = self.dropout_mask(samples, between, channel_dim, channels, x)
        if self.strength.rows is None:
            return mask
        rows = self.row_factors(samples, len(between) + 2, x)
        return rows if mask is None else rows * mask

    def row_factors(self, samples: int, dims: int, x: Tensor) -> Tensor:
        """The factor of each sample, [B, 1, ...]."""
        rows = self.strength.rows
        assert rows is not None
        assert samples % len(rows) == 0, f"{len(rows)} multipliers for a batch of {samples}"
        rows = rows.to(x.device, x.dtype).repeat_interleave(samples // len(rows))
        return rows.view(samples, *[1] * (dims - 1))

    def dropout_mask(
        self, samples: int, between: tuple[int, ...], channel_dim: int, channels: int, x: Tensor
    ) -> Tensor | None:
        """What is left out of this step's answer, or None.

        The masks come from torch's own generator, since that is the one whose state checkpointing puts back when it
        computes a layer a second time.
        """
        if not (self.drops and self.training):
            return None
        mask: Tensor | None = None
        if self.dropout.rank > 0:
            shape = [samples, *[1] * len(between)]
            shape.insert(channel_dim, channels)
            mask = _keep((samples, channels), self.dropout.rank, x).view(shape)
        if self.dropout.neuron > 0:
            shape = [samples, *between]
            shape.insert(channel_dim, channels)
            values = _keep(tuple(shape), self.dropout.neuron, x)
            mask = values if mask is None else mask * values
        return mask


class StandsIn(Protocol):
    """What can stand in the place of a layer: an adapter, or a module that changes what comes into the layer."""

    stand_ins: ClassVar[tuple[type[nn.Module], type[nn.Module]]]
    """What stands in the place of a linear layer, and of a convolution."""

    def hold(self, base: Any) -> Mapping[str, Any]:
        """The attributes of the layer that stands in the place of `base`, besides those of `base` itself."""
        ...


def stand_in(parent: nn.Module, attribute: str, adapter: StandsIn) -> None:
    """Put a layer with `adapter` in the place of the layer `attribute` of `parent`.

    The two share everything, the very dictionary of parameters included, so that whoever moves or replaces a weight
    through one of them does so for both. A layer with its own `forward` (another adapter) keeps doing its own
    arithmetic; of a layer that looks its weight up, the handle is used. The adapter does not become a child of the
    model.
    """
    base = getattr(parent, attribute)
    kind = adapter.stand_ins[isinstance(base, nn.Conv2d)]
    layer = kind.__new__(kind)
    layer.__dict__.update(base.__dict__)
    layer.__dict__.pop("forward", None)
    layer.__dict__.pop("_compiled_call_impl", None)
    layer.__dict__.update(_held=(adapter,), **adapter.hold(base))
    setattr(parent, attribute, layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes just what its class in torch does, with numbers the fused functions take."""
    if "forward" in layer.__dict__:
        return False
    if isinstance(layer, nn.Conv2d):
        plain_padding = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain_padding and type(layer).forward is nn.Conv2d.forward
    return type(layer).forward is nn.Linear.forward


def _keep(shape: tuple[int, ...], probability: float, like: Tensor) -> Tensor:
    """A mask of `1 / (1 - p)` where something is kept and 0 where it is dropped."""
    kept = torch.rand(shape, device=like.device) >= probability
    return kept.to(like.dtype) / (1.0 - probability)
