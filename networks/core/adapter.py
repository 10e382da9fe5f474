"""A LoRA adapter, and the layers that stand in the place of those it adapts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.core.low_rank import FrozenWeight, compute_dtype, low_rank_conv, low_rank_linear, low_rank_onto
from networks.core.parted import DiagonalUp, JoinedWeight, Parted, StackedDown
from networks.core.perturbation import Ggpo, Perturbation


@dataclass(frozen=True)
class Dropout:
    """What is left out at random while training; 0 is nothing."""

    neuron: float = 0.0
    """Probability that one value between down and up is zeroed."""
    rank: float = 0.0
    """Probability that one rank of one sample is zeroed."""
    module: float = 0.0
    """Probability that a whole adapter sits out a step."""


@dataclass
class Strength:
    """How strongly the adapters of one network act; all of them share one."""

    multiplier: float = 1.0
    rows: Tensor | None = None
    """[B] one more factor for each sample of a batch."""
    enabled: bool = True


class LoraAdapter(nn.Module):
    """Two thin layers without bias; `alpha / rank` times the second of the first is added to a layer's answer.

    With `parts`, the layer's rows are several layers of so many rows, each with a pair of the given rank and alpha;
    `rank` and `alpha` are then those of the joined pair, whose `up` is block-diagonal.

    Attributes:
        frozen: is not trained.
        resting: takes no part, as if it were not there.
        skipped: sits out the running step of training.
        loaded: its weights came from a file.
    """

    alpha: Tensor

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: Dropout,
        strength: Strength,
        parts: Sequence[int] = (),
        ggpo: Ggpo | None = None,
    ) -> None:
        super().__init__()
        # Always made on the CPU, also when the model is on the meta device or still on its way to another.
        with torch.device("cpu"):
            pair: tuple[Any, Any] = _parted_layers(layer, rank, parts) if parts else _thin_layers(layer, rank)
            self.lora_down, self.lora_up = pair
            self.register_buffer("alpha", torch.tensor(float(alpha) * max(len(parts), 1)))
        for weight in self.lora_down.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for weight in self.lora_up.parameters():
            nn.init.zeros_(weight)
        self.rank = rank * max(len(parts), 1)
        self.scale = alpha / rank
        self.perturbation = Perturbation(layer, ggpo) if ggpo is not None and isinstance(layer, nn.Linear) else None
        self.perturbs = self.perturbation is not None
        self.dropout = dropout
        self.strength = strength
        self.drops = dropout.neuron > 0 or dropout.rank > 0
        self.frozen = False
        self.resting = False
        self.skipped = False
        self.loaded = False

    def factor(self) -> float:
        """What the low-rank product is multiplied with now; 0 when it need not be computed."""
        if self.resting or not self.strength.enabled or (self.skipped and self.training):
            return 0.0
        return self.scale * self.strength.multiplier

    def file_tensors(self) -> dict[str, Tensor]:
        """What belongs in a file, by the end of its key."""
        return {"alpha": self.alpha, "lora_down.weight": self.lora_down.weight, "lora_up.weight": self.lora_up.weight}

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

    def rank_scale(self, samples: int, between: tuple[int, ...], rank_dim: int, x: Tensor) -> Tensor | None:
        """The factors of `down(x)`, or None for ones: dropout masks and the factor of each sample.

        `between` is the shape of `down(x)` without the samples and the ranks, which are dimension `rank_dim` of it.
        The masks come from torch's own generator, since that is the one whose state checkpointing puts back when it
        computes a layer a second time.
        """
        ones = [1] * len(between)

        def broadcast(values: Tensor) -> Tensor:  # [B, r or 1] -> [B, ..., r or 1, ...]
            shape = [samples, *ones]
            shape.insert(rank_dim, values.shape[1])
            return values.view(shape)

        scale: Tensor | None = None
        rows = self.strength.rows
        if rows is not None:
            assert samples % len(rows) == 0, f"{len(rows)} multipliers for a batch of {samples}"
            rows = rows.to(x.device, x.dtype).repeat_interleave(samples // len(rows))
            scale = broadcast(rows[:, None])
        if self.training and self.dropout.rank > 0:
            mask = _keep((samples, self.rank), self.dropout.rank, x)
            scale = broadcast(mask) if scale is None else scale * broadcast(mask)
        if self.training and self.dropout.neuron > 0:
            shape = [samples, *between]
            shape.insert(rank_dim, self.rank)
            mask = _keep(tuple(shape), self.dropout.neuron, x)
            scale = mask if scale is None else scale * mask
        return scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Read linear weights from those of a 1x1 convolution and the other way round; no alpha means the rank."""
        for name, layer in (("lora_down", self.lora_down), ("lora_up", self.lora_up)):
            key = f"{prefix}{name}.weight"
            if key in state_dict and state_dict[key].shape != layer.weight.shape:
                if state_dict[key].numel() == layer.weight.numel():
                    state_dict[key] = state_dict[key].reshape(layer.weight.shape)
        if f"{prefix}lora_down.weight" in state_dict:
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
            rank_scale = adapter.rank_scale(len(input), tuple(input.shape[1:-1]), input.dim() - 1, input)
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
            rank_scale = adapter.rank_scale(len(input), self._output_size(input), 1, input)
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


def stand_in(parent: nn.Module, attribute: str, adapter: LoraAdapter) -> None:
    """Put a layer with `adapter` in the place of the layer `attribute` of `parent`.

    The two share everything, the very dictionary of parameters included, so that whoever moves or replaces a weight
    through one of them does so for both. A layer with its own `forward` (another adapter) keeps doing its own
    arithmetic; of a layer that looks its weight up, the handle is used. The adapter does not become a child of the
    model.
    """
    base = getattr(parent, attribute)
    kind: type[nn.Module] = AdaptedConv2d if isinstance(base, nn.Conv2d) else AdaptedLinear
    layer = kind.__new__(kind)
    layer.__dict__.update(base.__dict__)
    layer.__dict__.pop("forward", None)
    layer.__dict__.pop("_compiled_call_impl", None)
    layer.__dict__.update(
        _held=(adapter,),
        _base_forward=None if _is_plain(base) else base.forward,
        _handle=base.forward if isinstance(base.forward, FrozenWeight) else None,
        _down=_weight_of(adapter.lora_down),
        _up=_weight_of(adapter.lora_up),
    )
    setattr(parent, attribute, layer)


def _thin_layers(layer: Any, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
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


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes just what its class in torch does, with numbers the fused functions take."""
    if "forward" in layer.__dict__:
        return False
    if isinstance(layer, nn.Conv2d):
        plain_padding = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain_padding and type(layer).forward is nn.Conv2d.forward
    return type(layer).forward is nn.Linear.forward


def _keep(shape: tuple[int, ...], probability: float, like: Tensor) -> Tensor:
    """A mask of `1 / (1 - p)` where something is kept and 0 where it is dropped."""
    kept = torch.rand(shape, device=like.device) >= probability
    return kept.to(like.dtype) / (1.0 - probability)
