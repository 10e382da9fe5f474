"""Blocks whose frozen weights lie in main memory and come to the device just before they are needed.

Weights that are not trained never change, so nothing is ever copied back: the original stays in main memory, one flat
pinned buffer for each block, and a load is one copy into one of a few device buffers that are used in turn. The next
blocks are on their way while one is calculated; only events order the copies and the calculation.

The model knows nothing of this. Each block gets two hooks, which bring its weights before it runs and send for the
next ones afterwards, and its answer gets one, which does the same when the gradient of the answer is there. (Backward
hooks of modules will not do: the full one gives wrong gradients to blocks called with keyword tensors, and both warn
about the first block.) The layers look their weights up again in backward (`FrozenLayer`), so that nothing need be
recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.memory.copier import Copier
from library.memory.fp8 import SCALE_NAME
from library.memory.frozen_layers import frozen_layers

ALIGNMENT = 256
"""Bytes; every tensor begins at a multiple of it, as kernels like it."""
BUFFERS = 2
"""Device buffers: one is calculated with while the other is filled."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in the flat buffer of its block."""

    owner: dict[str, Any]
    """The `_parameters` or `_buffers` of its layer."""
    name: str
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in `flat`."""
        return flat[self.start : self.start + self.size].view(self.dtype).view(self.shape)

    def stand_in(self, flat: Tensor) -> Tensor:
        """The tensor in `flat` as a parameter, if it is one."""
        view = self.view(flat)
        return nn.Parameter(view, requires_grad=False) if isinstance(self.owner[self.name], nn.Parameter) else view


class _Block:
    """The streamed weights of one block: the original in main memory, and who reads it."""

    def __init__(self, layers: Sequence[nn.Module], copier: Copier) -> None:
        self.places = _places(layers)
        self.size = max((place.start + place.size for place in self.places), default=0)
        self.host = copier.host(self.size)
        for place in self.places:
            place.view(self.host).copy_(place.owner[place.name])
        self.slot: int | None = None
        """The device buffer that holds it."""
        self.arrival: Any = None
        """The moment at which it is there."""
        self.waited = True
        """Whether what the device is told comes after that moment already."""
        self._views: dict[int | None, list[Tensor]] = {}

    def stand_in(self, slot: int | None, flat: Tensor) -> None:
        """Let the layers read from `flat`, the buffer `slot` or the original.

        A parameter is made from a view, so that it shares the version of the buffer: autograd then refuses to go on
        with a weight that somebody kept and that has been overwritten since.
        """
        if slot not in self._views:
            self._views[slot] = [place.stand_in(flat) for place in self.places]
        for place, view in zip(self.places, self._views[slot], strict=True):
            place.owner[place.name] = view


class BlockSwap:
    """Streams the blocks `streamed` of `blocks`, which are in running order, to the device of `copier`.

    The linear layers of these blocks have handles (`attach_frozen_layers`). Their weights may lie anywhere at first.

    Attributes:
        order: the blocks that are streamed, as numbers in `blocks`.
        loaded: bytes copied to the device until now.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], streamed: Sequence[int], copier: Copier, buffers: int = BUFFERS
    ) -> None:
        assert buffers >= 2, "one buffer is read while another is filled"
        self.copier = copier
        self.order = sorted(streamed)
        self.loaded = 0
        self._blocks: dict[int, _Block] = {}
        for index in self.order:
            layers = list(frozen_layers(blocks[index]))
            self._blocks[index] = _Block([module for module, _ in layers], copier)
            for _, layer in layers:
                layer.fetch = functools.partial(self._bring, index)
            self._park(index)
        largest = max((block.size for block in self._blocks.values()), default=0)
        self._slots = [copier.device(largest) for _ in range(buffers)]
        self._owners: list[int | None] = [None] * buffers
        self._loads = 0
        self._loaded_at = [0] * buffers
        self._in_backward = False
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._before_forward, index))
            block.register_forward_hook(functools.partial(self._after_forward, index))

    def away(self) -> set[tuple[int, str]]:
        """What is streamed, as `settle` takes it."""
        return {(id(place.owner), place.name) for block in self._blocks.values() for place in block.places}

    def sizes(self) -> dict[int, int]:
        """Streamed block -> bytes of its weights."""
        return {index: self._blocks[index].size for index in self.order}

    def buffer_bytes(self) -> int:
        """What the buffers take on the device."""
        return sum(slot.numel() for slot in self._slots)

    def keep(self, index: int) -> None:
        """Give a streamed block memory of its own on the device, for good; call it between two steps."""
        block = self._blocks.pop(index)
        self.order.remove(index)
        flat = self.copier.device(block.size)
        self.copier.wait(self.copier.copy(block.host, flat, self.copier.mark()))
        block.stand_in(_OWN, flat)
        self._owners = [None if owner == index else owner for owner in self._owners]

    def keep_what_fits(self, size: int) -> int:
        """Keep as many streamed blocks as take no more than `size` bytes, evenly spread; how many that were."""
        for count in range(len(self.order), 0, -1):
            chosen = [self.order[i] for i in spread_evenly(len(self.order), count)]
            if sum(self._blocks[index].size for index in chosen) <= size:
                for index in chosen:
                    self.keep(index)
                return count
        return 0

    def _park(self, index: int) -> None:
        """A block that is away shows the original, to whoever counts or saves it."""
        block = self._blocks[index]
        block.slot, block.arrival, block.waited = None, None, True
        block.stand_in(None, block.host)

    def _bring(self, index: int) -> None:
        """See to it that the weights of a block are there for whatever the device is told next."""
        block = self._blocks.get(index)
        if block is None:  # it has come to stay
            return
        if block.slot is None:
            self._load(index, keep=(index,))
        if not block.waited:
            self.copier.wait(block.arrival)
            block.waited = True

    def _before_forward(self, index: int, *_: object) -> None:
        self._in_backward = False
        self._send_for(self._coming(index - 1))
        self._bring(index)

    def _after_forward(self, index: int, block: nn.Module, inputs: object, answer: Any) -> None:
        self._send_for(self._coming(index))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(functools.partial(self._before_backward, index))
                break

    def _before_backward(self, index: int, *_: object) -> None:
        # The block that ran after this one has its gradients, since those of this one begin.
        self._in_backward = True
        self._send_for(self._coming(index))
        self._bring(index)

    def _coming(self, index: int) -> list[int]:
        """The next streamed blocks to be calculated, one for each buffer; in forward those after `index`."""
        if self._in_backward:
            ahead = [i for i in reversed(self.order) if i <= index] + self.order
        else:
            ahead = [i for i in self.order if i > index]
            # With a graph the last ones come again first; without one the next pass begins at the front.
            ahead += reversed(self.order) if torch.is_grad_enabled() else self.order
        return list(dict.fromkeys(ahead))[: len(self._slots)]

    def _send_for(self, coming: Sequence[int]) -> None:
        for index in coming:
            if self._blocks[index].slot is None:
                self._load(index, keep=coming)

    def _load(self, index: int, keep: Sequence[int]) -> None:
        """Copy a block into the buffer that was filled longest ago and whose block is none of `keep`."""
        free = [slot for slot, owner in enumerate(self._owners) if owner is None or owner not in keep]
        slot = min(free, key=lambda slot: self._loaded_at[slot])
        owner = self._owners[slot]
        if owner is not None:
            self._park(owner)
        block, flat = self._blocks[index], self._slots[slot]
        self._loads += 1
        self._owners[slot], self._loaded_at[slot], block.slot = index, self._loads, slot
        # Everything that reads what the buffer held has been told to the device by now.
        block.arrival = self.copier.copy(block.host, flat[: block.size], self.copier.mark())
        block.waited = False
        block.stand_in(slot, flat)
        self.loaded += block.size


def settle(model: nn.Module, device: torch.device, away: Container[tuple[int, str]]) -> None:
    """Bring everything of `model` to `device` but what is `away`: the id of a `_parameters` or `_buffers`, a name."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or (id(table), name) in away:
                    continue
                is_parameter = isinstance(tensor, nn.Parameter)
                moved = tensor.detach().to(device)
                table[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


def streamed_bytes(block: nn.Module) -> int:
    """What of a block would be streamed."""
    places = _places([module for module, _ in frozen_layers(block)])
    return max((place.start + place.size for place in places), default=0)


def spread_evenly(total: int, chosen: int) -> list[int]:
    """`chosen` of `total` places with equal gaps between them, so that copies have equal time."""
    return [(2 * i + 1) * total // (2 * chosen) for i in range(chosen)]


_OWN = -1
"""In place of the number of a buffer: memory of the block's own."""


def _places(layers: Sequence[nn.Module]) -> list[_Place]:
    """The weights and scales of `layers`, one after the other."""
    places, start = [], 0
    for layer in layers:
        for owner, name in ((layer._parameters, "weight"), (layer._buffers, SCALE_NAME)):
            tensor: Any = owner.get(name)
            if tensor is None or tensor.requires_grad or tensor.numel() == 1:
                continue
            places.append(_Place(owner, name, start, tensor.nbytes, tensor.dtype, tensor.shape))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places
