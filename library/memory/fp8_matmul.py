"""Linear layers that calculate in float8: weight and input are rounded, the sums are exact.

Each row of the input gets a scale of its own at each step; so does each row of the gradient. Adapters beside the layer
calculate in 16 bits as always. Scales of the weight are one for each of its rows, or none.
"FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.frozen_layers import FrozenLayer, compute_dtype

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
MULTIPLE = 16
"""Both sides of a matrix must be multiples of it for the GPU's product."""
ROWS_SCALED_SINCE = (9, 0)
"""Compute capability from which on one product takes a scale for each row; 8.9 takes one for the whole tensor."""
AVAILABLE_SINCE = (8, 9)


class Float8Linear(FrozenLayer):
    """The forward of a linear layer whose weight is float8, with one scale for each row or without."""

    far = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        rows, columns = layer.weight.shape
        self._fits = rows % MULTIPLE == 0 and columns % MULTIPLE == 0

    def __call__(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., O]"""
        dtype = compute_dtype(input)
        if torch.compiler.is_compiling() or not self._fits:
            return F.linear(input.to(dtype), self.read(dtype), self.bias(dtype))
        return _Float8Linear.apply(input, self, dtype)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C] in float8 and the scale of each row, float32 [N, 1]."""
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp_min(1e-12)
    return (x / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


def float8_product(x: Tensor, weight: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` [N, C] times the transpose of the float8 `weight` [O, C], whose rows have the scales [O, 1] -> [N, O]."""
    rounded, scale = rounded_rows(x)
    if not x.is_cuda:
        out = (rounded.float() @ weight.float().t()) * scale
        return (out if row_scale is None else out * row_scale.float().t()).to(dtype)
    if torch.cuda.get_device_capability(x.device) >= ROWS_SCALED_SINCE:
        ones = torch.ones(1, len(weight), device=x.device) if row_scale is None else row_scale.float().t().contiguous()
        return torch._scaled_mm(rounded, weight.t(), scale, ones, out_dtype=dtype, use_fast_accum=True)
    one = torch.ones((), device=x.device)
    out = torch._scaled_mm(rounded, weight.t(), one, one, out_dtype=torch.float32)
    return (out * scale if row_scale is None else out * scale * row_scale.float().t()).to(dtype)


def is_available(device: torch.device) -> bool:
    """Whether the device has products of float8; on the CPU they are imitated, to try it out."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AVAILABLE_SINCE


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Linear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        weight, scale = layer.stored()
        y = float8_product(x.reshape(-1, x.shape[-1]).to(dtype), weight, scale, dtype)
        bias = layer.bias(dtype)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        weight, scale = ctx.layer.stored()
        rows = dy.reshape(-1, dy.shape[-1])
        # Here the sum goes over the rows of the weight, so that their scales belong to what they meet.
        rows = rows if scale is None else rows * scale.to(dy.dtype).t()
        dx = float8_product(rows, weight.t().contiguous(), None, dy.dtype)
        return dx.view(*dy.shape[:-1], -1), None, None
