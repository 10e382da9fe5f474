"""LoKr: the change of a weight is the Kronecker product of a small matrix and a large one, which may be of low rank.

From "KronA: Parameter Efficient Tuning with Kronecker Adapter" (https://arxiv.org/abs/2212.10650), with the key names
that LyCORIS writes: kron(w1 [l, m], w2 [k, n]) for a weight of l k outputs and m n inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.adapter import Dropout, Strength
from networks.core.base_layer import BaseLayer
from networks.core.hadamard import tucker_product
from networks.core.plugged import PluggedAdapter, in_dtype_of
from networks.core.reweighted import difference_only, reweighted

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class KroneckerPlan:
    """How weights are divided when training starts."""

    factor: int = -1
    """See `divided`."""
    tucker: bool = False
    """Kernels greater than one pixel have a core of their own."""


class KroneckerAdapter(PluggedAdapter):
    """Parameters `lokr_w1`, and `lokr_w2` or `lokr_w2_a` and `lokr_w2_b`, with `lokr_t2` before them for a core.

    A file may also have `lokr_w1_a` and `lokr_w1_b`. With neither matrix of low rank there is no scale.
    """

    def __init__(
        self, layer: nn.Module, rank: int, alpha: float, sizes: Sizes, dropout: Dropout, strength: Strength
    ) -> None:
        self.whole = "lokr_w1" in sizes and "lokr_w2" in sizes
        super().__init__(rank, rank if self.whole else alpha, dropout, strength)
        self.shape = BaseLayer(layer).shape
        for name, size in sizes.items():
            values = torch.empty(size, device="cpu")
            if name in ("lokr_w2", "lokr_w2_b"):
                nn.init.zeros_(values)
            else:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            self.register_parameter(name, nn.Parameter(values))

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        parameters = dict(self.named_parameters())
        fast = [parameter for name, parameter in parameters.items() if name.startswith("lokr_w1")]
        return [parameter for name, parameter in parameters.items() if not name.startswith("lokr_w1")], fast

    def scale_of(self, alpha: float) -> float:
        return 1.0 if self.whole else super().scale_of(alpha)

    def answer(self, base: BaseLayer, x: Tensor, factor: float) -> Tensor:
        if not base.is_conv:
            return self.add(base.answer(x), self._product_with(x), base, factor)
        parameters = list(self.parameters())
        if self.strength.rows is None and not (self.drops and self.training):
            return reweighted(x, base, self.difference, parameters, factor)
        return self.add(base.answer(x), difference_only(x, base, self.difference, parameters), base, factor)

    def difference(self, *parameters: Tensor) -> Tensor:
        """What is added to the weight at a factor of 1."""
        names = [name for name, _ in self.named_parameters()]
        return kronecker_difference(dict(zip(names, parameters, strict=True)), self.shape)

    def norm(self) -> Tensor:
        first, second = matrices(dict(self.named_parameters()))
        return self.scale * first.float().norm() * second.float().norm()

    def _product_with(self, x: Tensor) -> Tensor:
        """[..., m n] -> [..., l k], without making the large matrix: w1 X w2^T, X being x as [m, n]."""
        first, second = in_dtype_of(x, *matrices(dict(self.named_parameters())))
        (x,) = in_dtype_of(x, x)
        rows = x.reshape(*x.shape[:-1], first.shape[1], second.shape[1])
        mixed = first @ (rows @ second.flatten(1).t())
        return mixed.flatten(-2)


def planned_sizes(layer: nn.Module, rank: int, plan: KroneckerPlan) -> Sizes:
    """The sizes of a new adapter's parameters.

    The second matrix is whole where low rank would save nothing: from a rank of half its greater side on.
    """
    outputs, inputs, *kernel = BaseLayer(layer).shape
    (rows, k), (columns, n) = divided(outputs, plan.factor), divided(inputs, plan.factor)
    pixels = math.prod(kernel)
    if rank >= max(k, n) / 2:
        return {"lokr_w1": (rows, columns), "lokr_w2": (k, n, *kernel)}
    if plan.tucker and pixels > 1:
        return {
            "lokr_w1": (rows, columns),
            "lokr_t2": (rank, rank, *kernel),
            "lokr_w2_a": (rank, k),
            "lokr_w2_b": (rank, n),
        }
    return {"lokr_w1": (rows, columns), "lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * pixels)}


def divided(number: int, factor: int) -> tuple[int, int]:
    """`number` as a product of two, the smaller first.

    A factor above 0 that divides it is one of them; otherwise the two are as near each other as they can be with the
    first not above `factor`, if that is above 0.
    """
    if factor > 0 and number % factor == 0:
        other = number // factor
        return min(factor, other), max(factor, other)
    limit = math.isqrt(number) if factor <= 0 else min(factor, math.isqrt(number))
    first = next(first for first in range(limit, 0, -1) if number % first == 0)
    return first, number // first


def matrices(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors, [l, m] and [k, n] or [k, n, kernel...] or [k, n kernel...]."""
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        return first, tensors["lokr_w2"]
    if "lokr_t2" in tensors:
        return first, tucker_product(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    return first, tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]


def kronecker_difference(tensors: Mapping[str, Any], shape: torch.Size) -> Tensor:
    """What an adapter adds to a weight of `shape` at a scale of 1; `tensors` by the end of the key."""
    first, second = matrices(tensors)
    inputs = shape[1] // first.shape[1]
    second = second.reshape(len(second), inputs, -1)
    # kron by hand: torch's own would count the kernel of the first matrix too.
    product = first[:, None, :, None, None] * second[None, :, None, :, :]
    return product.reshape(shape)
