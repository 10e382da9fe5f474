"""Linear layers whose frozen weights stay in main memory and are calculated with there.

Worth it for a layer that is given one vector for each sample, such as the one that makes the modulation of a block: to
multiply a matrix with a vector takes the time of reading the matrix once, so that its weight need neither lie on the
device nor be brought there. The vector comes to main memory, which the host waits for once in a step since all such
layers are given the same, and the answer, a few kilobytes, goes back beside whatever the device calculates.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.fp8 import SCALE_NAME
from library.memory.frozen_layers import FrozenLayer, compute_dtype


class HostLinear:
    """Stands in the place of the forward of a linear layer.

    Attributes:
        far: as that of `FrozenLayer`.
    """

    far = True

    def __init__(self, layer: nn.Linear, device: torch.device, last: LastVector) -> None:
        self._parameters: dict[str, Any] = layer._parameters
        self._device = device
        self._last = last
        bias: Any = layer._parameters["bias"]
        self._bias: Tensor | None = None if bias is None else bias.detach().clone()

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight, on the device: for an adapter that needs its numbers."""
        weight: Tensor = self._parameters["weight"]
        return weight.to(self._device, dtype)

    def here(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in main memory."""
        return self._parameters["weight"].to(dtype), None if self._bias is None else self._bias.to(dtype)

    def __call__(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., O], on the device of `input`"""
        dtype = compute_dtype(input)
        answer: Tensor = _HostLinear.apply(input, self._last.of(input).to(dtype), self, dtype)
        return answer


class LastVector:
    """What was given last, in main memory: it is fetched once for all layers that are given the same tensor."""

    def __init__(self) -> None:
        self._seen: weakref.ref[Tensor] | None = None
        self._here = torch.empty(0)

    def of(self, x: Tensor) -> Tensor:
        """`x` in main memory."""
        if self._seen is None or self._seen() is not x:
            self._here, self._seen = x.detach().to("cpu"), weakref.ref(x)
        return self._here


def attach_host_layers(layers: Sequence[nn.Linear], device: torch.device, dtype: torch.dtype) -> None:
    """Let `layers`, which have handles (`attach_frozen_layers`) and weights in main memory, calculate there.

    A weight in float8 becomes `dtype` for good, with the numbers that its handle reads: processors have no arithmetic
    for float8, and a cast at each step takes longer than the product. Call it before a network stands in the layers.
    """
    last = LastVector()
    for layer in layers:
        handle: Any = layer.forward
        assert isinstance(handle, FrozenLayer)
        weight = handle.read(dtype) if layer.weight.itemsize == 1 else layer.weight.detach()
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer._buffers.pop(SCALE_NAME, None)
        layer.__dict__["forward"] = HostLinear(layer, device, last)


class _HostLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: Tensor, layer: HostLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        return _sent(F.linear(here, *layer.here(dtype)), x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        weight, _ = ctx.layer.here(dy.dtype)
        return _sent(dy.to("cpu") @ weight, dy.device), None, None, None


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`; the host does not wait until it is there."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
