"""The arithmetic of LoRA: a layer's answer plus a product of two thin matrices, in as few passes as possible.

`y = W x + b + factor * up(rank_scale * down(x))`, from "LoRA: Low-Rank Adaptation of Large Language Models"
(https://arxiv.org/abs/2106.09685). Everything that scales is folded into the rank side or into a GEMM, and the
product is accumulated in place into the base layer's output, so that no other pass over a full-size tensor is made.
Backward computes only what somebody asked for. Weights may have another dtype than the computation; autograd brings
each gradient back to the dtype of its tensor.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation and groups of a convolution."""


@runtime_checkable
class FrozenWeight(Protocol):
    """A weight that is looked up each time it is needed: its numbers may be rounded, or be on their way to the device.

    Nothing of it is kept for backward, which looks it up again.

    Attributes:
        far: it had better not be read where the answer of its layer does, which is calculated elsewhere or in float8.
    """

    far: bool

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`."""
        ...


def low_rank_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    factor: float,
    rank_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer with its adapter: x [..., C], weight [O, C] or a handle, down [r, C], up [O, r] -> [..., O].

    `rank_scale` [B, 1.., r] or [..., r] multiplies `down(x)` and gets no gradient.
    """
    dtype = compute_dtype(x)
    if torch.compiler.is_compiling():
        if not isinstance(weight, Tensor):  # the compiler itself sees that only the rounded weight need be kept
            y = F.linear(x.to(dtype), weight.read(dtype), None if bias is None else bias.to(dtype))
            return low_rank_onto(y, x, down, up, factor, rank_scale)
        return _LowRankLinear.apply(x, weight, bias, down, up, factor, rank_scale, dtype)
    return _apply_linear(x, weight, bias, down, up, factor, rank_scale, dtype)


def low_rank_onto(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: float, rank_scale: Tensor | None = None
) -> Tensor:
    """`y` [..., O], the answer of a linear layer that does its own arithmetic, plus the adapter's part.

    The sum takes the memory of `y`, unseen by autograd: the layer's own backward must not look at its answer, which
    that of a linear layer never does.
    """
    if torch.compiler.is_compiling():
        h = F.linear(x.to(y.dtype), down.to(y.dtype))
        h = h if rank_scale is None else h * rank_scale
        return y + F.linear(h * factor, up.to(y.dtype))
    return _LowRankOnto.apply(y, x, down, up, factor, rank_scale)


def low_rank_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    geometry: Geometry,
    factor: float,
    rank_scale: Tensor | None = None,
) -> Tensor:
    """A convolution with its adapter: x [B, C, H, W], down [r, C, k, k], up [O, r, 1, 1] -> [B, O, h, w].

    `rank_scale` [B, r or 1, h or 1, w or 1] multiplies `down(x)` and gets no gradient.
    """
    arguments = (x, weight, bias, down, up, geometry, factor, rank_scale, compute_dtype(x))
    if torch.compiler.is_compiling():
        return _LowRankConv.apply(*arguments)
    return _apply_conv(*arguments)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes on `x`: autocast's, if it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        factor: float,
        rank_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        base, base_bias = weight if isinstance(weight, Tensor) else weight.read(dtype), bias
        if not (x.dtype == base.dtype == down.dtype == dtype):
            x, base, down, up = x.to(dtype), base.to(dtype), down.to(dtype), up.to(dtype)
        if bias is not None and bias.dtype != dtype:
            base_bias = bias.to(dtype)
        x = x.contiguous()
        y = F.linear(x, base, base_bias)
        rows = x.view(-1, x.shape[-1])
        h = _scaled_rows(F.linear(rows, down), x, rank_scale)
        y.view(-1, y.shape[-1]).addmm_(h, up.t(), alpha=factor)
        handle = None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(rows, None if handle else weight, down, up, h, rank_scale)
        ctx.factor, ctx.handle = factor, handle
        # F.linear answers with a view of its rows, which nobody could change in place after this; .data is no view.
        return y.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, weight, down, up, h, rank_scale = ctx.saved_tensors
        needs, factor, shape = ctx.needs_input_grad, ctx.factor, grads[0].shape
        dy = grads[0].reshape(-1, shape[-1])
        dx = dw = db = d_down = d_up = None
        if needs[0] or needs[3]:
            dh = _scaled_rows(dy.mm(up), grads[0], rank_scale)
            if needs[3]:
                d_down = torch.addmm(down, dh.t(), x, beta=0, alpha=factor)
            if needs[0]:
                base = weight.to(dy.dtype) if ctx.handle is None else ctx.handle.read(dy.dtype)
                dx = dy.mm(base).addmm_(dh, down, alpha=factor).view(*shape[:-1], x.shape[1])
        if needs[4]:
            d_up = torch.addmm(up, dy.t(), h, beta=0, alpha=factor)
        if needs[1]:
            dw = dy.t().mm(x)
        if needs[2]:
            db = dy.sum(0)
        return dx, dw, db, d_down, d_up, None, None, None


class _LowRankOnto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, factor: float, rank_scale: Tensor | None
    ) -> Tensor:
        x = x.to(y.dtype).contiguous()
        down, up = down.to(y.dtype), up.to(y.dtype)
        rows = x.view(-1, x.shape[-1])
        h = _scaled_rows(F.linear(rows, down), x, rank_scale)
        y = y.data if y.is_contiguous() else y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(h, up.t(), alpha=factor)
        ctx.save_for_backward(rows, down, up, h, rank_scale)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, down, up, h, rank_scale = ctx.saved_tensors
        needs, factor, shape = ctx.needs_input_grad, ctx.factor, grads[0].shape
        dy = grads[0].reshape(-1, shape[-1])
        dx = d_down = d_up = None
        if needs[1] or needs[2]:
            dh = _scaled_rows(dy.mm(up), grads[0], rank_scale)
            if needs[2]:
                d_down = torch.addmm(down, dh.t(), x, beta=0, alpha=factor)
            if needs[1]:
                dx = torch.addmm(x, dh, down, beta=0, alpha=factor).view(*shape[:-1], x.shape[1])
        if needs[3]:
            d_up = torch.addmm(up, dy.t(), h, beta=0, alpha=factor)
        return grads[0], dx, d_down, d_up, None, None


class _LowRankConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        geometry: Geometry,
        factor: float,
        rank_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        base, base_bias = weight, bias
        if not (x.dtype == weight.dtype == down.dtype == dtype):
            x, base, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
            base_bias = None if bias is None else bias.to(dtype)
        stride, padding, dilation, _ = geometry
        y = F.conv2d(x, base, base_bias, *geometry)
        if _is_pointwise(down, geometry):
            h = _mix(down.flatten(1), x)
        else:
            h = F.conv2d(x, down, None, stride, padding, dilation)
        if rank_scale is not None:
            h = h * rank_scale
        _mix_onto(y, up.flatten(1), h, factor)
        ctx.save_for_backward(x, weight, down, up, h, rank_scale)
        ctx.geometry, ctx.factor, ctx.bias_sizes = geometry, factor, None if bias is None else list(bias.shape)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, weight, down, up, h, rank_scale = ctx.saved_tensors
        needs, factor, dy = ctx.needs_input_grad, ctx.factor, grads[0]
        pointwise = _is_pointwise(down, ctx.geometry)
        mixes_base = pointwise and ctx.geometry[3] == 1 and not (needs[1] or needs[2])
        dx = dw = db = d_down = d_up = None
        if mixes_base and needs[0]:
            dx = _mix(weight.to(dy.dtype).flatten(1).t(), dy)
        elif not mixes_base and (needs[0] or needs[1] or needs[2]):
            dx, dw, db = _conv_gradients(dy, x, weight.to(dy.dtype), ctx.bias_sizes, ctx.geometry, needs[:3])
        if needs[0] or needs[3]:
            dh = _mix(up.flatten(1).t(), dy)
            if rank_scale is not None:
                dh = dh * rank_scale
            if pointwise:
                if needs[3]:
                    d_down = _mix_gradient(dh, x).mul_(factor).view_as(down)
                if dx is not None:
                    _mix_onto(dx, down.flatten(1).t(), dh, factor)
            else:
                ranks = (*ctx.geometry[:3], 1)
                mask = (needs[0], needs[3], False)
                through, d_down, _ = _conv_gradients(dh.mul_(factor), x, down, None, ranks, mask)
                if dx is not None and through is not None:
                    dx.add_(through)
        if needs[4]:
            d_up = _mix_gradient(dy, h).mul_(factor).view_as(up)
        return dx, dw, db, d_down, d_up, None, None, None, None


# Function.apply first looks for functorch transforms, 13 us of the 65 us that a small layer takes on a CPU and nothing
# that training uses; the same method one class up is the bare call. The compiler knows Function.apply only.
_apply_linear = super(torch.autograd.Function, _LowRankLinear).apply
_apply_conv = super(torch.autograd.Function, _LowRankConv).apply


def _refuse_second_derivative() -> None:
    """Saved `down(x)` has no graph of its own, so a second derivative would be silently wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("LoRA layers cannot be differentiated twice (create_graph=True)")


def _scaled_rows(h: Tensor, like: Tensor, rank_scale: Tensor | None) -> Tensor:
    """`h` [N, r] times `rank_scale`, which broadcasts against [*like.shape[:-1], r]."""
    if rank_scale is None:
        return h
    return (h.view(*like.shape[:-1], h.shape[1]) * rank_scale).view(h.shape)


def _is_pointwise(down: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution sees one pixel at a time, and every pixel once."""
    return down.shape[2:] == (1, 1) and geometry[:2] == ((1, 1), (0, 0))


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution: matrix [O, C], x [B, C, H, W] -> [B, O, H, W]."""
    batch, _, height, width = x.shape
    if x.is_contiguous():
        return torch.bmm(matrix.expand(batch, -1, -1), x.flatten(2)).view(batch, -1, height, width)
    if x.is_contiguous(memory_format=torch.channels_last):
        pixels = x.permute(0, 2, 3, 1)
        return pixels.view(-1, pixels.shape[3]).mm(matrix.t()).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return F.conv2d(x, matrix[:, :, None, None])


def _mix_onto(y: Tensor, matrix: Tensor, h: Tensor, factor: float) -> None:
    """Add `factor` times a 1x1 convolution of `h` [B, r, H, W] to `y` [B, O, H, W] in place; matrix [O, r]."""
    if y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(len(y), -1, -1), h.flatten(2), alpha=factor)
    elif y.is_contiguous(memory_format=torch.channels_last):
        pixels = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
        y.permute(0, 2, 3, 1).view(-1, y.shape[1]).addmm_(pixels, matrix.t(), alpha=factor)
    else:
        y.add_(_mix(matrix, h), alpha=factor)


def _mix_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of a 1x1 convolution's matrix: dy [B, O, H, W], x [B, C, H, W] -> [O, C]."""
    if dy.is_contiguous() and x.is_contiguous():
        return torch.bmm(dy.flatten(2), x.flatten(2).transpose(1, 2)).sum(0)
    dy_pixels = dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
    return dy_pixels.t().mm(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))


def _conv_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution's input, weight and bias that are asked for."""
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        dy, x, weight, bias_sizes, stride, padding, dilation, False, (0, 0), groups, needs
    )
