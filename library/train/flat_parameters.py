"""Many small parameters in one buffer, so that one kernel does what would take one for each of them.

A LoRA has hundreds of tensors of a few thousand numbers; clearing, clipping, averaging and updating them one by one
costs more than the arithmetic. Here every parameter and every gradient is a view into a flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 1 << 26
"""Numbers of one buffer, unless a single parameter has more. While parameters move in, one buffer of them is there
twice; those of a whole U-Net in one would be there twice all at once."""

# Parameters begin at multiples of this many numbers, since matrix kernels are faster on aligned memory. The gaps hold
# zeros with zero gradients, which every optimizer leaves alone.
ALIGNMENT = 16


@dataclass(frozen=True)
class _Piece:
    """Where one parameter lies."""

    parameter: nn.Parameter
    group: int
    start: int


@dataclass(frozen=True)
class _Buffer:
    """The parameters of one device and dtype, and their gradients."""

    values: Tensor
    grads: Tensor
    pieces: list[_Piece]
    bounds: list[tuple[int, int, int]]
    """(group, begin, end) of each parameter group that has parameters here."""


class FlatParameters:
    """Moves the parameters of optimizer groups, and their gradients, into one buffer per device and dtype.

    Large models get several, of 2 ** 26 numbers each.

    The parameters stay the tensors they were, with the values they had; only their memory changes. Build it when they
    have their final device and dtype. Gradients are never None afterwards: a parameter that backward does not reach
    has a gradient of zeros, so that weight decay acts on it.

    Whoever clears gradients by setting them to None, or moves a parameter, breaks the tie; `check` tells.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups = [dict(group) | {"params": list(group["params"])} for group in groups]
        members: dict[tuple[torch.device, torch.dtype], list[tuple[int, nn.Parameter]]] = {}
        for number, group in enumerate(self._groups):
            for parameter in group["params"]:
                members.setdefault((parameter.device, parameter.dtype), []).append((number, parameter))
        distinct = {id(parameter) for entries in members.values() for _, parameter in entries}
        assert len(distinct) == sum(map(len, members.values())), "a parameter is in two optimizer groups"
        self._buffers = [_build(part, *kind) for kind, entries in members.items() for part in _parts(entries)]
        self._flat: list[list[nn.Parameter]] | None = None
        self._retired: set[int] = set()

    @property
    def values(self) -> list[Tensor]:
        """All parameters, in as few flat tensors as there are buffers."""
        return [buffer.values for buffer in self._buffers]

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients, likewise."""
        return [buffer.grads for buffer in self._buffers]

    def zero_grad(self) -> None:
        """Clear every gradient; they stay allocated."""
        for grads in self.gradients:
            grads.zero_()

    def retire(self, group: int) -> None:
        """The parameters of a group stay as they are from now on: optimizers pass over what has no gradient."""
        for parameter in self._groups[group]["params"]:
            parameter.requires_grad_(False)
            parameter.grad = None
        for flat in self._flat[group] if self._flat is not None else ():
            flat.grad = None
        self._retired.add(group)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most `max_norm`; returns the norm before, on the device.

        The same numbers as `torch.nn.utils.clip_grad_norm_`, but for gradients that are not finite: they all become
        zero, so that one broken batch does not break the weights.
        """
        norm = self.norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in self.gradients:
            grads.mul_(factor.to(grads.device, grads.dtype)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return norm

    def norm(self) -> Tensor:
        """The joint norm of all gradients, a scalar on the device."""
        norms = [torch.linalg.vector_norm(grads, dtype=torch.float32) for grads in self.gradients]
        if len(norms) == 1:
            return norms[0]
        device = norms[0].device if norms else torch.device("cpu")
        return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]) if norms else torch.zeros(1))

    def broadcast(self, from_first: Callable[[Tensor], None]) -> None:
        """Start every process from the same values: `from_first` overwrites a tensor with the first process's."""
        for buffer in self._buffers:
            from_first(buffer.values)

    def all_reduce(self, mean: Callable[[Tensor], Tensor | None]) -> None:
        """Average the gradients over the processes: `mean` averages one tensor in place, or returns the average."""
        for grads in self.gradients:
            result = mean(grads)
            if result is not None and result is not grads:
                grads.copy_(result)

    def optimizer_groups(self, elementwise: bool) -> list[dict[str, Any]]:
        """The groups for the optimizer.

        With `elementwise`, for optimizers that treat every number alike (AdamW, Lion, SGD), each group is one flat
        parameter per buffer. Otherwise, for those that look at a tensor's shape or in blocks of its own
        (Adafactor, 8-bit states), they are the parameters themselves.
        """
        if not elementwise:
            return [dict(group) for group in self._groups]
        if self._flat is None:
            self._flat = [[] for _ in self._groups]
            for buffer in self._buffers:
                for group, begin, end in buffer.bounds:
                    flat = nn.Parameter(buffer.values[begin:end])
                    flat.grad = buffer.grads[begin:end]
                    self._flat[group].append(flat)
        return [group | {"params": flat} for group, flat in zip(self._groups, self._flat, strict=True)]

    def check(self) -> None:
        """Assert that every parameter and every gradient still is a view into the buffers."""
        for buffer in self._buffers:
            for piece in buffer.pieces:
                if piece.group in self._retired:
                    continue
                self._check_view(piece.parameter, buffer, piece.start, f"of shape {list(piece.parameter.shape)}")
        for number, flats in enumerate(self._flat or []):
            for flat in flats if number not in self._retired else ():
                assert flat.grad is not None, f"the gradient of group {number} was set to None; use zero_grad() here"

    @staticmethod
    def _check_view(parameter: nn.Parameter, buffer: _Buffer, start: int, name: str) -> None:
        offset = start * buffer.values.element_size()
        assert parameter.data_ptr() == buffer.values.data_ptr() + offset, (
            f"a parameter {name} was moved out of its flat buffer; build FlatParameters after that"
        )
        grad = parameter.grad
        assert grad is not None and grad.data_ptr() == buffer.grads.data_ptr() + offset, (
            f"the gradient of a parameter {name} was replaced; clear gradients with FlatParameters.zero_grad()"
        )


def _parts(entries: Sequence[tuple[int, nn.Parameter]]) -> Iterator[list[tuple[int, nn.Parameter]]]:
    """`entries` in their order, as many at a time as fit into one buffer."""
    part: list[tuple[int, nn.Parameter]] = []
    size = 0
    for group, parameter in entries:
        if part and size + parameter.numel() > LARGEST:
            yield part
            part, size = [], 0
        part.append((group, parameter))
        size += parameter.numel()
    if part:
        yield part


@torch.no_grad()
def _build(entries: Sequence[tuple[int, nn.Parameter]], device: torch.device, dtype: torch.dtype) -> _Buffer:
    pieces: list[_Piece] = []
    bounds: list[tuple[int, int, int]] = []
    end = 0
    for group, parameter in entries:
        pieces.append(_Piece(parameter, group, end))
        size = -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        if bounds and bounds[-1][0] == group:
            bounds[-1] = (group, bounds[-1][1], end + size)
        else:
            bounds.append((group, end, end + size))
        end += size
    values = torch.zeros(end, device=device, dtype=dtype)
    grads = torch.zeros_like(values)
    for piece in pieces:
        parameter = piece.parameter
        window = slice(piece.start, piece.start + parameter.numel())
        view = values[window].view(parameter.shape)
        view.copy_(parameter)
        grad = grads[window].view(parameter.shape)
        if parameter.grad is not None:
            grad.copy_(parameter.grad)
        parameter.data = view
        parameter.grad = grad
    return _Buffer(values, grads, pieces, bounds)
