"""LoHa: the change of a weight is the product, number by number, of two low-rank matrices.

From "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
(https://arxiv.org/abs/2108.06098), with the key names that LyCORIS writes. Of a 3x3 convolution the kernel counts with
the inputs, or, with `use_tucker`, has a small core of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.core.adapter import Dropout, Strength
from networks.core.base_layer import BaseLayer
from networks.core.plugged import PluggedAdapter
from networks.core.reweighted import difference_only, reweighted

FLAT = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
"""[O, r], [r, C k k] twice."""
TUCKER = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
"""[r, r, k, k], [r, O], [r, C] twice."""
_SPREAD = {"hada_t1": 0.1, "hada_t2": 0.1, "hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
"""Of the normal numbers that training starts from."""


class HadamardAdapter(PluggedAdapter):
    """Parameters named as in `FLAT` or `TUCKER`."""

    def __init__(
        self, layer: nn.Module, rank: int, alpha: float, tucker: bool, dropout: Dropout, strength: Strength
    ) -> None:
        super().__init__(rank, alpha, dropout, strength)
        self.shape = BaseLayer(layer).shape
        self.names = TUCKER if tucker and math.prod(self.shape[2:]) > 1 else FLAT
        outputs, inputs, kernel = self.shape[0], self.shape[1], tuple(self.shape[2:])
        sizes: Mapping[str, tuple[int, ...]] = {"a": (outputs, rank), "b": (rank, inputs * math.prod(kernel))}
        if self.names is TUCKER:
            sizes = {"a": (rank, outputs), "b": (rank, inputs)}
        for name in self.names:
            size = (rank, rank, *kernel) if name in ("hada_t1", "hada_t2") else sizes[name[-1]]
            values = nn.init.normal_(torch.empty(size, device="cpu"), std=_SPREAD[name])
            self.register_parameter(name, nn.Parameter(values))

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        parameters = dict(self.named_parameters())
        fast = parameters.pop("hada_w2_a")
        return list(parameters.values()), [fast]

    def answer(self, base: BaseLayer, x: Tensor, factor: float) -> Tensor:
        parameters = list(self.parameters())
        if self.strength.rows is None and not (self.drops and self.training):
            return reweighted(x, base, self.difference, parameters, factor)
        return self.add(base.answer(x), difference_only(x, base, self.difference, parameters), base, factor)

    def difference(self, *parameters: Tensor) -> Tensor:
        """What is added to the weight at a factor of 1."""
        return hadamard_difference(parameters).reshape(self.shape)

    def norm(self) -> Tensor:
        return self.scale * self.difference(*self.parameters()).float().norm()


def hadamard_difference(parameters: Sequence[Tensor]) -> Tensor:
    """The product of the tensors `FLAT` or `TUCKER`: [O, C k k] or [O, C, k, k]."""
    if len(parameters) == len(FLAT):
        first_a, first_b, second_a, second_b = parameters
        return (first_a @ first_b) * (second_a @ second_b)
    half = len(TUCKER) // 2
    return tucker_product(*parameters[:half]) * tucker_product(*parameters[half:])


def tucker_product(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Core [r, r, k, k], outputs [r, O], inputs [r, C] -> [O, C, k, k]."""
    return torch.einsum("ij...,jc,io->oc...", core, inputs, outputs)


def merged_difference(tensors: Mapping[str, Any]) -> Tensor:
    """What an adapter in a file adds to the weight at a scale of 1; `tensors` by the end of the key."""
    return hadamard_difference([tensors[name].float() for name in (TUCKER if "hada_t1" in tensors else FLAT)])
