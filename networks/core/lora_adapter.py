"""A LoRA adapter, and the layers that stand in the place of those it adapts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.core.adapter import Adapter, Dropout, Strength, is_plain
from networks.core.low_rank import FrozenWeight, compute_dtype, low_rank_conv, low_rank_linear, low_rank_onto
from networks.core.merge import low_rank_norm
from networks.core.parted import DiagonalUp, JoinedWeight, Parted, StackedDown
from networks.core.perturbation import Ggpo, Perturbation
from networks.core.principal import BesideTwin, principal_pair
from networks.core.slices import OneUnit


@dataclass(frozen=True)
class LoraTraining:
    """What is special about how a LoRA is trained; its file is an ordinary one all the same."""

    ggpo: Ggpo | None = None
    """Random nudges."""
    fixed_down: bool = False
    """LoRA-FA (https://arxiv.org/abs/2308.03303): `down` stays as it starts, and only `up` is trained."""
    unit: int = 0
    """DyLoRA (https://arxiv.org/abs/2210.07558): so many neighbouring ranks are trained at a time; 0 is all."""
    pissa: int | None = None
    """PiSSA (https://arxiv.org/abs/2404.02948): start from the weight's principal part; see `principal_pair`."""


PLAIN = LoraTraining()


class LoraAdapter(Adapter):
    """Two thin layers without bias; `alpha / rank` times the second of the first is added to a layer's answer.

    With `parts`, the layer's rows are several layers of so many rows, each with a pair of the given rank and alpha;
    `rank` and `alpha` are then those of the joined pair, whose `up` is block-diagonal.

    With PiSSA the pair starts as the principal part of the weight, and that part is taken off again by a twin of the
    pair that never changes, so that the layer starts as it was and the weight itself stays untouched. In a file pair
    and twin are one pair of twice the rank, which any program adds to the original model.
    """

    twin_down: Tensor
    twin_up: Tensor

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: Dropout,
        strength: Strength,
        parts: Sequence[int] = (),
        training: LoraTraining = PLAIN,
    ) -> None:
        super().__init__(rank * max(len(parts), 1), alpha / rank, dropout, strength)
        # Always made on the CPU, also when the model is on the meta device or still on its way to another.
        with torch.device("cpu"):
            pair: tuple[Any, Any] = _parted_layers(layer, rank, parts) if parts else thin_layers(layer, rank)
            self.lora_down, self.lora_up = pair
            self.register_buffer("alpha", torch.tensor(float(alpha) * max(len(parts), 1)))
        for weight in self.lora_down.parameters():
            if training.fixed_down:  # the published start of LoRA-FA
                nn.init.normal_(weight, std=math.sqrt(2.0 / (weight[0].numel() + rank)))
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for weight in self.lora_up.parameters():
            nn.init.zeros_(weight)
        ggpo = training.ggpo
        self.perturbation = Perturbation(layer, ggpo) if ggpo is not None and isinstance(layer, nn.Linear) else None
        self.perturbs = self.perturbation is not None
        self.fixed_down, self.unit = training.fixed_down, training.unit
        self.unit_start: int | None = None
        self.has_twin = training.pissa is not None
        if training.pissa is not None:
            assert not parts and not self.drops, "PiSSA is for whole layers without dropout"
            self._start_from_principal(layer, training.pissa)

    def file_tensors(self) -> dict[str, Tensor]:
        down, up, alpha = self.lora_down.weight, self.lora_up.weight, self.alpha
        if self.has_twin:
            alpha, down, up = 2 * alpha, torch.cat([down, self.twin_down]), torch.cat([up, -self.twin_up], dim=1)
        return {"alpha": alpha, "lora_down.weight": down, "lora_up.weight": up}

    @property
    def file_rank(self) -> int:
        return 2 * self.rank if self.has_twin else self.rank

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [] if self.fixed_down else list(self.lora_down.parameters()), list(self.lora_up.parameters())

    def hold(self, base: Any) -> Mapping[str, Any]:
        down, up = _weight_of(self.lora_down), _weight_of(self.lora_up)
        if self.has_twin:
            down, up = BesideTwin(self, "down"), BesideTwin(self, "up")
        elif self.unit:
            down, up = OneUnit(self, "down"), OneUnit(self, "up")
        looked_up = isinstance(base.forward, FrozenWeight) and not base.forward.far
        return {
            "_base_forward": None if is_plain(base) else base.forward,
            "_handle": base.forward if looked_up else None,
            "_down": down,
            "_up": up,
        }

    def norm(self) -> Tensor | None:
        return None if self.has_twin else self.scale * low_rank_norm(self.lora_down.weight, self.lora_up.weight)

    def shrinking(self) -> tuple[list[nn.Parameter], int]:
        return [*self.lora_down.parameters(), *self.lora_up.parameters()], 2

    @property
    def draws(self) -> bool:
        return self.unit > 0 or super().draws

    def start_step(self, random: random.Random) -> None:
        super().start_step(random)
        if self.unit:
            self.unit_start = random.randrange(self.rank) // self.unit * self.unit

    def factor(self) -> float:
        factor = super().factor()
        if self.unit_start is not None and self.training:
            factor *= math.sqrt(self.rank / (self.unit_start + self.unit))
        return factor

    def follow_gradient(self) -> None:
        """Make the nudges of the next step as large as the gradients at hand say.

        Raises:
            ValueError: there are no gradients.
        """
        if self.perturbation is None:
            return
        d_down, d_up = joined_gradient(self.lora_down), joined_gradient(self.lora_up)
        if d_down is None or d_up is None:
            raise ValueError(
                "--network_args ggpo_sigma and ggpo_beta look at the gradient of a whole step, which there is none of "
                "here; leave them out, or leave --fused_backward_pass out"
            )
        self.perturbation.update(self.lora_down.weight, self.lora_up.weight, d_down, d_up, self.scale)

    def _start_from_principal(self, layer: nn.Module, rounds: int) -> None:
        pair = principal_pair(layer, self.rank, self.scale, rounds)
        for thin, values, name in zip((self.lora_down, self.lora_up), pair, ("twin_down", "twin_up"), strict=True):
            with torch.no_grad():
                thin.weight.copy_(values.reshape(thin.weight.shape))
            self.register_buffer(name, thin.weight.detach().clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Read linear weights from those of a 1x1 convolution and the other way round; no alpha means the rank.

        Of a pair and its twin the twin is told from the pair again.
        """
        down, up = f"{prefix}lora_down.weight", f"{prefix}lora_up.weight"
        if self.has_twin and down in state_dict and len(state_dict[down]) == self.file_rank:
            state_dict[down], state_dict[f"{prefix}twin_down"] = state_dict[down].chunk(2)
            state_dict[up], twin = state_dict[up].chunk(2, dim=1)
            state_dict[f"{prefix}twin_up"] = -twin
            state_dict[f"{prefix}alpha"] = state_dict[f"{prefix}alpha"] / 2
        match_kernel(state_dict, {down: self.lora_down.weight, up: self.lora_up.weight})
        if down in state_dict:
            alpha = state_dict.setdefault(f"{prefix}alpha", torch.tensor(float(self.rank)))
            self.scale = (float(alpha) or float(self.rank)) / self.rank
            self.loaded = True
        super()._load_from_state_dict(state_dict, prefix, *rest)


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; weight, bias and state-dict keys are those of the layer it stands for."""

    _held: tuple[LoraAdapter]
    _base_forward: Callable[[Tensor], Tensor] | None
    _handle: FrozenWeight | None
    _down: Mapping[str, Tensor]
    _up: Mapping[str, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., O]"""
        adapter = self._held[0]
        factor = adapter.factor()
        base_forward = self._base_forward
        if factor == 0.0:
            return super().forward(input) if base_forward is None else base_forward(input)
        rank_scale = None
        if adapter.drops or adapter.strength.rows is not None:
            rank_scale = adapter.channel_scale(
                len(input), tuple(input.shape[1:-1]), input.dim() - 1, adapter.rank, input
            )
        down, up = self._down["weight"], self._up["weight"]
        own = self._parameters
        weight: Any = own["weight"] if base_forward is None else self._handle
        if adapter.perturbs and adapter.training:
            return self._nudged(input, weight, factor, rank_scale)
        if weight is None:
            assert base_forward is not None
            return low_rank_onto(base_forward(input), input, down, up, factor, rank_scale)
        return low_rank_linear(input, weight, own["bias"], down, up, factor, rank_scale)

    def _nudged(self, input: Tensor, weight: Any, factor: float, rank_scale: Tensor | None) -> Tensor:
        """The same with this step's nudge of the weight, which is part of it wherever its numbers can be had."""
        perturbation, down, up = self._held[0].perturbation, self._down["weight"], self._up["weight"]
        assert perturbation is not None
        dtype = compute_dtype(input)
        nudge = perturbation.draw(self.in_features, dtype)
        if weight is None:
            assert self._base_forward is not None
            y = self._base_forward(input) + F.linear(input, nudge)
            return low_rank_onto(y, input, down, up, factor, rank_scale)
        nudged = nudge.add_(weight if isinstance(weight, Tensor) else weight.read(dtype))
        return low_rank_linear(input, nudged, self._parameters["bias"], down, up, factor, rank_scale)


class AdaptedConv2d(nn.Conv2d):
    """A convolution with an adapter; weight, bias and state-dict keys are those of the layer it stands for."""

    _held: tuple[LoraAdapter]
    _base_forward: Callable[[Tensor], Tensor] | None
    _down: Mapping[str, Tensor]
    _up: Mapping[str, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, h, w]"""
        adapter = self._held[0]
        factor = adapter.factor()
        base_forward = self._base_forward
        if factor == 0.0:
            return super().forward(input) if base_forward is None else base_forward(input)
        rank_scale = None
        if adapter.drops or adapter.strength.rows is not None:
            rank_scale = adapter.channel_scale(len(input), self._output_size(input), 1, adapter.rank, input)
        down, up = self._down["weight"], self._up["weight"]
        if base_forward is not None:
            h = F.conv2d(input, down, None, self.stride, self.padding, self.dilation)
            h = h * factor if rank_scale is None else h * (rank_scale * factor)
            return base_forward(input) + F.conv2d(h, up)
        own = self._parameters
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return low_rank_conv(input, own["weight"], own["bias"], down, up, geometry, factor, rank_scale)  # type: ignore[arg-type]

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        """Height and width of the answer."""
        if isinstance(self.padding, str):
            return tuple(-(-size // step) for size, step in zip(x.shape[2:], self.stride, strict=True))
        return tuple(
            (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
            for size, pad, gap, kernel, step in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )


def thin_layers(layer: Any, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Down has the kernel, stride, padding and dilation of `layer`; up mixes channels only."""
    if isinstance(layer, nn.Conv2d):
        down: Any = nn.Conv2d(
            layer.in_channels,
            rank,
            kernel_size=layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=False,
        )
        return down, nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)


def joined_gradient(layer: nn.Module) -> Tensor | None:
    """The gradient of a thin layer's weight, or None where there is none."""
    gradients = [parameter.grad for parameter in layer.parameters()]
    present = [gradient for gradient in gradients if gradient is not None]
    if len(present) < len(gradients):
        return None
    return layer.join(present) if isinstance(layer, Parted) else present[0]


def _parted_layers(layer: Any, rank: int, parts: Sequence[int]) -> tuple[StackedDown, DiagonalUp]:
    """A pair for each of the parts of a linear layer."""
    assert sum(parts) == layer.out_features, f"{list(parts)} of {layer.out_features} rows"
    downs = [nn.Linear(layer.in_features, rank, bias=False) for _ in parts]
    ups = [nn.Linear(rank, rows, bias=False) for rows in parts]
    return StackedDown(downs, rank, parts), DiagonalUp(ups, rank, parts)


def _weight_of(layer: nn.Module) -> Mapping[str, Any]:
    """Where the weight of a thin layer is looked up whenever it is needed."""
    return JoinedWeight(layer) if isinstance(layer, Parted) else layer._parameters


def match_kernel(state_dict: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Give the tensors the shapes of `expected` where both hold as many numbers."""
    for key, like in expected.items():
        if key in state_dict and state_dict[key].shape != like.shape and state_dict[key].numel() == like.numel():
            state_dict[key] = state_dict[key].reshape(like.shape)


LoraAdapter.stand_ins = (AdaptedLinear, AdaptedConv2d)
