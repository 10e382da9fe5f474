"""DoRA: direction and length of the columns of a weight are learnt apart.

From "DoRA: Weight-Decomposed Low-Rank Adaptation" (https://arxiv.org/abs/2402.09353): W' = m (W + s BA) / |W + s BA|,
the norm being a constant for the gradient (its section 4.3). Lengths are those of the inputs' columns, as ComfyUI,
A1111, Forge and LyCORIS all read them, or those of the outputs' rows.

Scaling a column of the weight is scaling that input, so nothing of the size of a weight is made or kept: the norm of
the sum is worked out from that of the weight and from products with the thin matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.core.adapter import Dropout, Strength
from networks.core.base_layer import BaseLayer
from networks.core.lora_adapter import match_kernel, thin_layers
from networks.core.low_rank import low_rank_onto
from networks.core.merge import low_rank_norm
from networks.core.plugged import PluggedAdapter


class DoraAdapter(PluggedAdapter):
    """A LoRA pair and `dora_scale`: [1, C, 1...] of inputs, or with `on_outputs` [O, 1, 1...]."""

    base_squares: Tensor

    def __init__(
        self, layer: Any, rank: int, alpha: float, on_outputs: bool, dropout: Dropout, strength: Strength
    ) -> None:
        super().__init__(rank, alpha, dropout, strength)
        with torch.device("cpu"):
            self.lora_down, self.lora_up = thin_layers(layer, rank)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        base = BaseLayer(layer)
        self.on_outputs = on_outputs
        self.shape = [1] * len(base.shape)
        self.shape[0 if on_outputs else 1] = base.channels if on_outputs else base.inputs
        weight = base.weight(torch.float32).detach()
        squares = torch.zeros(math.prod(self.shape)) if weight.is_meta else self._summed(weight**2).cpu()
        self.register_buffer("base_squares", squares, persistent=False)
        self.dora_scale = nn.Parameter(squares.sqrt().view(self.shape))

    def file_tensors(self) -> dict[str, Tensor]:
        down, up = self.lora_down.weight, self.lora_up.weight
        return {"alpha": self.alpha, "dora_scale": self.dora_scale, "lora_down.weight": down, "lora_up.weight": up}

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [*self.lora_down.parameters(), self.dora_scale], list(self.lora_up.parameters())

    def norm(self) -> Tensor:
        return self.scale * low_rank_norm(self.lora_down.weight, self.lora_up.weight)

    def shrinking(self) -> tuple[list[nn.Parameter], int]:
        return [*self.lora_down.parameters(), *self.lora_up.parameters()], 2

    def answer(self, base: BaseLayer, x: Tensor, factor: float) -> Tensor:
        lengths = self.dora_scale.flatten() / self._norms(base)
        y = self._with_pair(base, x if self.on_outputs else x * _along(lengths, base).to(x.dtype))
        if self.on_outputs:
            y = y * _along(lengths, base).to(y.dtype)
            if base.bias is not None:
                y = y + _along(base.bias * (1 - lengths), base).to(y.dtype)
        multiplier = factor / self.scale
        if multiplier == 1.0 and self.strength.rows is None:
            return y
        plain = base.answer(x)
        part = y - plain
        if self.strength.rows is not None:
            part = part * self.row_factors(len(part), part.dim(), part)
        return torch.add(plain, part, alpha=multiplier)

    def _with_pair(self, base: BaseLayer, x: Tensor) -> Tensor:
        """The answer of the layer with the pair alone."""
        down, up, y = self.lora_down.weight, self.lora_up.weight, base.answer(x)
        if not base.is_conv:
            mask = self.dropout_mask(len(x), tuple(x.shape[1:-1]), x.dim() - 1, self.rank, x)
            return low_rank_onto(y, x, down, up, self.scale, mask)
        h = base.apply(x, down)
        mask = self.dropout_mask(len(h), tuple(h.shape[2:]), 1, self.rank, h)
        return y + F.conv2d((h if mask is None else h * mask) * self.scale, up)

    @torch.no_grad()
    def _norms(self, base: BaseLayer) -> Tensor:
        """Of W + s BA, [C] or [O]: |W|^2 + 2 s <W, BA> + s^2 |BA|^2, in products of the size of the rank."""
        dtype = base.dtype if base.dtype.itemsize > 1 else torch.bfloat16  # float8 has no arithmetic
        weight = base.weight(dtype).flatten(1)
        down, up = self.lora_down.weight.flatten(1), self.lora_up.weight.flatten(1)
        with torch.autocast(weight.device.type, enabled=False):
            if self.on_outputs:
                mixed = 2 * (weight @ down.to(dtype).t()).float() + self.scale * (up @ (down @ down.t())).float()
                change = (up.float() * mixed).sum(1)
            else:
                mixed = 2 * (up.to(dtype).t() @ weight).float() + self.scale * ((up.t() @ up) @ down).float()
                change = (down.float() * mixed).view(len(down), base.inputs, -1).sum((0, 2))
            squares = (self.base_squares + self.scale * change).clamp_(min=0)
            return squares.sqrt_() + torch.finfo(torch.float32).eps

    def _summed(self, squares: Tensor) -> Tensor:
        """[O, C, ...] -> [C] or [O]"""
        return squares.sum([dim for dim in range(squares.dim()) if dim != (0 if self.on_outputs else 1)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        pair = {"lora_down.weight": self.lora_down.weight, "lora_up.weight": self.lora_up.weight}
        match_kernel(state_dict, {f"{prefix}{end}": weight for end, weight in pair.items()})
        match_kernel(state_dict, {f"{prefix}dora_scale": self.dora_scale})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _along(values: Tensor, base: BaseLayer) -> Tensor:
    """[C], to be multiplied with or added to what has so many channels."""
    return values.view(-1, 1, 1) if base.is_conv else values


def decomposed_difference(tensors: Mapping[str, Any], weight: Tensor, scale: float) -> Tensor:
    """What an adapter in a file adds to `weight`, [O, C] or [O, C, k, k] in float32."""
    down, up, lengths = (tensors[key].float() for key in ("lora_down.weight", "lora_up.weight", "dora_scale"))
    together = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    axis = 0 if lengths.numel() == len(weight) and lengths.shape[0] == len(weight) else 1
    dims = [dim for dim in range(weight.dim()) if dim != axis]
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    norms = torch.linalg.vector_norm(together, dim=dims, keepdim=True) + torch.finfo(torch.float32).eps
    return together * (lengths.reshape(shape) / norms) - weight
