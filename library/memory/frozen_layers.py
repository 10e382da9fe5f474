"""Layers that are never trained and keep a handle to their weight for backward, instead of a copy.

Autograd would keep the weight that a layer calculated with: a copy in 16 bits of one in float8, or memory that is
another weight's by then where weights are streamed. These layers look their weight up again, so float8 costs what
float8 takes, and streaming needs no recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.fp8 import FLOAT8, SCALE_NAME, Quantizer, dequantize


class FrozenLayer:
    """Stands in the place of `forward` of one layer.

    Attributes:
        fetch: brings the weight to the device when it is not there; called before each look.
        idle: nobody calculates with the weight, as where a product is known already.
        far: an adapter adds to the answer of the layer, and does not calculate layer and adapter in one.
    """

    far = False

    def __init__(self, layer: nn.Module) -> None:
        self._parameters: dict[str, Any] = layer._parameters
        self._buffers: dict[str, Any] = layer._buffers
        self.fetch: Callable[[], None] | None = None
        self.idle = False

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The weight and its scale, as they lie on the device now."""
        # In this order: what differs between layers must not be seen by the compiler, or each gets its own program.
        if not torch.compiler.is_compiling() and self.fetch is not None:
            self.fetch()
        return self._parameters["weight"], self._buffers.get(SCALE_NAME)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype` as of now; nobody may keep it beyond the calculation at hand."""
        if not torch.compiler.is_compiling() and self.idle:
            return torch.empty(1, dtype=dtype).expand(self._parameters["weight"].shape)
        weight, scale = self.stored()
        if scale is None and weight.dtype == dtype:
            return weight
        return dequantize(weight, scale, dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in `dtype`, or None."""
        bias = self._parameters["bias"]
        return None if bias is None else bias.to(dtype)


class FrozenLinear(FrozenLayer):
    """The forward of a linear layer."""

    def __call__(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., O]"""
        dtype = compute_dtype(input)
        if torch.compiler.is_compiling():
            return F.linear(input.to(dtype), self.read(dtype), self.bias(dtype))
        return _Linear.apply(input, self, dtype)


class FrozenConv2d(FrozenLayer):
    """The forward of a convolution with zeros around it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.geometry: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def __call__(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, h, w]"""
        dtype = compute_dtype(input)
        if torch.compiler.is_compiling():
            return F.conv2d(input.to(dtype), self.read(dtype), self.bias(dtype), *self.geometry)
        return _Conv2d.apply(input, self, dtype)


def attach_frozen_layers(
    model: nn.Module,
    scales: Mapping[str, Tensor] | None = None,
    wanted: Callable[[nn.Module], bool] | None = None,
    linear: Callable[[nn.Linear], FrozenLayer] = FrozenLinear,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Give handles to the frozen layers of `model` that `wanted` says, and to those in float8.

    Call it before a network stands in the layers. `scales` become buffers that are not saved. A layer that has a
    `forward` of its own, or whose weight is trained, is left alone. A float8 weight of any other module, which would
    calculate with it as it is, becomes `dtype`. `linear` makes the handle of a linear layer in float8.
    """
    for name, scale in (scales or {}).items():
        model.get_submodule(name).register_buffer(SCALE_NAME, scale, persistent=False)
    for module in model.modules():
        if not _is_plain_layer(module):
            _widen(module, dtype)
        elif module.weight.dtype in FLOAT8 or (wanted is not None and wanted(module)):
            is_linear = isinstance(module, nn.Linear)
            of_linear = linear if module.weight.dtype in FLOAT8 else FrozenLinear
            handle: Any = of_linear(module) if is_linear else FrozenConv2d(module)  # type: ignore[arg-type]
            module.forward = handle


def round_weights(model: nn.Module, quantizer: Quantizer) -> None:
    """Let `quantizer` see the weights of the frozen linear layers and convolutions of a model that is there already."""
    for name, module in model.named_modules():
        if _is_plain_layer(module):
            rounded = quantizer(f"{name}.weight", module.weight.detach())
            module._parameters["weight"] = nn.Parameter(rounded, requires_grad=False)


def frozen_layers(module: nn.Module) -> Iterator[tuple[nn.Module, FrozenLayer]]:
    """The layers in `module` that have a handle, and the handle; also where a network stands in them."""
    for part in module.modules():
        handles = (value for value in part.__dict__.values() if isinstance(value, FrozenLayer))
        if (handle := next(handles, None)) is not None:  # an adapter holds its layer's more than once
            yield part, handle


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes on `x`: autocast's, if it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        return F.linear(x.to(dtype), layer.read(dtype), layer.bias(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        return dy.matmul(ctx.layer.read(dy.dtype)), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.like = layer, (x.shape, x.device)
        return F.conv2d(x.to(dtype), layer.read(dtype), layer.bias(dtype), *layer.geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, (shape, device) = grads[0], ctx.like
        stride, padding, dilation, groups = ctx.layer.geometry
        # Of the input only the shape is looked at.
        x = torch.empty((1,), dtype=dy.dtype, device=device).expand(shape)
        weight, mask = ctx.layer.read(dy.dtype), (True, False, False)
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
        )
        return dx, None, None


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether `module` is a frozen linear layer or convolution that computes just what its class in torch does."""
    if "forward" in module.__dict__ or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return False
    if isinstance(module, nn.Conv2d):
        plain_padding = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return plain_padding and type(module).forward is nn.Conv2d.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _widen(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype in FLOAT8:
            module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
