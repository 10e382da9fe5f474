"""A layer whose weight is made anew at each step from the parameters of an adapter.

`y = layer(x, W + factor * D(p))`. Neither the difference D nor what it is made of is kept for backward: both are made
again there, so that an adapter whose difference is as large as the weight costs no memory beyond one layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from networks.core.base_layer import BaseLayer
from networks.core.low_rank import compute_dtype

Difference = Callable[..., Tensor]
"""The parameters of an adapter -> what they add to the weight, of its shape."""


def reweighted(
    x: Tensor, base: BaseLayer, difference: Difference, parameters: Sequence[Tensor], factor: float
) -> Tensor:
    """The answer of `base` to `x` with `factor` times the difference added to its weight, which gets no gradient."""
    return _run(x, base, difference, parameters, factor, with_base=True)


def difference_only(x: Tensor, base: BaseLayer, difference: Difference, parameters: Sequence[Tensor]) -> Tensor:
    """The answer of `base` to `x` if the difference were its weight and it had no bias."""
    return _run(x, base, difference, parameters, 1.0, with_base=False)


def _run(
    x: Tensor,
    base: BaseLayer,
    difference: Difference,
    parameters: Sequence[Tensor],
    factor: float,
    with_base: bool,
) -> Tensor:
    dtype = compute_dtype(x)
    if torch.compiler.is_compiling():
        weight = factor * difference(*parameters).to(dtype)
        bias = base.bias if with_base else None
        weight = weight + base.weight(dtype) if with_base else weight
        return base.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype))
    answer: Tensor = _Reweighted.apply(x, base, difference, factor, with_base, dtype, *parameters)
    return answer


class _Reweighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: BaseLayer,
        difference: Difference,
        factor: float,
        with_base: bool,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.base, ctx.difference, ctx.factor, ctx.with_base, ctx.dtype = base, difference, factor, with_base, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, *parameters)
        with torch.autocast(x.device.type, enabled=False):
            weight = _weight(ctx, difference(*parameters))
            bias = base.bias if with_base else None
            return base.apply(x, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad
        asked = [parameter.detach().requires_grad_(need) for parameter, need in zip(parameters, needs[6:], strict=True)]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            made = ctx.difference(*asked)
            dx, d_weight = _gradients(ctx, x, made.detach(), grads[0].to(x.dtype))
            inputs = [parameter for parameter in asked if parameter.requires_grad]
            given: Iterator[Tensor] = iter(())
            if d_weight is not None:
                scaled = d_weight.to(made.dtype) * ctx.factor
                given = iter(torch.autograd.grad(made, inputs, scaled))
        return (dx, *[None] * 5, *(next(given) if need else None for need in needs[6:]))


def _gradients(ctx: Any, x: Tensor, made: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of the input and of the weight, as far as they are asked for."""
    of_input, of_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])
    weight = _weight(ctx, made)
    if not ctx.base.is_conv:
        dx = dy @ weight if of_input else None
        return dx, dy.flatten(0, -2).t() @ x.flatten(0, -2) if of_weight else None
    leaves = (x.detach().requires_grad_(of_input), weight.requires_grad_(of_weight))
    y = ctx.base.apply(*leaves)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy))
    return next(found) if of_input else None, next(found) if of_weight else None


def _weight(ctx: Any, made: Tensor) -> Tensor:
    """The weight to calculate with; `made` is not changed."""
    scaled: Tensor = made.to(ctx.dtype) * ctx.factor
    return scaled.add_(ctx.base.weight(ctx.dtype)) if ctx.with_base else scaled
