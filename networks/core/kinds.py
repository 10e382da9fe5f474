"""The kinds of adapters: what --network_args each knows, how one is made, and what one in a file does to a weight.

Which layers are covered is another matter, which the network modules of the families decide; any kind can be put on
the layers of any family.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from networks.core.adapter import Adapter, Dropout, Strength
from networks.core.decomposed import DoraAdapter, decomposed_difference
from networks.core.hadamard import TUCKER, HadamardAdapter
from networks.core.hadamard import merged_difference as hadamard_difference
from networks.core.key_names import ALPHA, AdapterShape, adapter_shapes, check_known
from networks.core.kronecker import KroneckerAdapter, KroneckerPlan, kronecker_difference, planned_sizes
from networks.core.lora_adapter import LoraAdapter, LoraTraining
from networks.core.merge import low_rank_difference
from networks.core.options import NetworkArgs
from networks.core.orthogonal import OrthogonalAdapter, turned_difference
from networks.core.principal import ROUNDS
from networks.core.targets import Target
from networks.core.training_args import GGPO_ARGS, TRAINING_ARGS, read_ggpo

logger = logging.getLogger(__name__)

CONV_ARGS = ("conv_dim", "conv_alpha")


class Kind(ABC):
    """One kind of adapter, with what --network_args say about it."""

    name: ClassVar[str]
    args: ClassVar[tuple[str, ...]] = ()
    """Keys of --network_args that only this kind knows."""
    size_args: ClassVar[tuple[str, ...]] = ()
    """Those of them that a file decides when the network is made from one."""
    conv_args: ClassVar[tuple[str, ...]] = CONV_ARGS
    """How convolutions with a kernel come to be covered."""
    default_alpha: ClassVar[float] = 1.0
    prefix: ClassVar[str] = "lora_"
    """Names of adapters begin with it, before `unet` or `te`."""
    of_text_encoders: ClassVar[bool] = True
    has_halves: ClassVar[bool] = True
    """Whether some of its parameters may learn faster than the others (LoRA+)."""

    @abstractmethod
    def __init__(self, args: NetworkArgs) -> None:
        """Read `args`; ValueError for a bad value."""

    @abstractmethod
    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        """An adapter for the layer of `target`; as its tensors in a file are, if it has any."""

    def adapter_name(self, name: str) -> str:
        """What the adapter of this kind is called where a LoRA is `name`."""
        return self.prefix + name.removeprefix(Kind.prefix)

    def covers(self, path: str) -> bool:
        """Whether the layer at `path` of a denoiser is covered, of those that the family offers."""
        return True

    def conv_shape(self, args: NetworkArgs, linear: AdapterShape) -> AdapterShape | None:
        """The size for convolutions with a kernel; None leaves them out.

        Raises:
            ValueError: the alpha is given alone.
        """
        rank, alpha = args.integer("conv_dim"), args.number("conv_alpha")
        if rank is None:
            if alpha is not None and "conv_block_dims" not in args:
                raise ValueError("--network_args conv_alpha needs conv_dim")
            return None
        return AdapterShape(rank, (1.0 if alpha is None else alpha) or float(rank))


class Lora(Kind):
    """LoRA and LoCon, and what is special about their training: DoRA, rsLoRA, PiSSA, and GGPO and parts where known."""

    name = "LoRA"
    args: ClassVar[tuple[str, ...]] = ("dora_wd", "wd_on_output", "rs_lora", "pissa", "pissa_niter")
    size_args = args

    def __init__(self, args: NetworkArgs) -> None:
        self.dora = args.boolean("dora_wd") or False
        self.on_outputs = args.boolean("wd_on_output") or False
        self.rank_stabilised = args.boolean("rs_lora") or False
        rounds = args.integer("pissa_niter", low=0)
        pissa = args.boolean("pissa") or False
        if self.on_outputs and not self.dora:
            raise ValueError("--network_args wd_on_output needs dora_wd=True")
        if rounds is not None and not pissa:
            raise ValueError("--network_args pissa_niter needs pissa=True")
        self.training = LoraTraining(
            ggpo=read_ggpo(args) if any(key in args for key in GGPO_ARGS) else None,
            pissa=(ROUNDS if rounds is None else rounds) if pissa else None,
        )
        if self.dora and (pissa or self.training.ggpo is not None or args.boolean("split_qkv")):
            raise ValueError("--network_args dora_wd does not go with pissa, ggpo_sigma or split_qkv")
        if pissa and (args.boolean("split_qkv") or self.training.ggpo is not None):
            raise ValueError("--network_args pissa does not go with split_qkv or ggpo_sigma")

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        shape, tensors = target.shape, target.shape.tensors
        alpha = shape.alpha
        if tensors is None and self.rank_stabilised:
            # The scale is alpha / sqrt(rank), saved as the alpha that means it to every program.
            alpha *= math.sqrt(shape.rank)
        if self.dora if tensors is None else "dora_scale" in tensors:
            on_outputs = self.on_outputs
            if tensors is not None:
                rows = tensors["dora_scale"]
                on_outputs = rows[0] == target.layer.weight.shape[0] and math.prod(rows) == rows[0]
            return DoraAdapter(target.layer, shape.rank, alpha, on_outputs, dropout, strength)
        training = self.training
        if training.pissa is not None:
            if tensors is not None:
                training = replace(training, pissa=None)
            elif dropout.neuron or dropout.rank:
                raise ValueError("--network_args pissa does not go with dropout or rank_dropout; module_dropout does")
        return LoraAdapter(target.layer, shape.rank, alpha, dropout, strength, target.parts, training)


class LoraFa(Kind):
    """LoRA of which only the second matrix is trained."""

    name = "LoRA-FA"
    has_halves = False

    def __init__(self, args: NetworkArgs) -> None:
        pass

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        shape, training = target.shape, LoraTraining(fixed_down=True)
        return LoraAdapter(target.layer, shape.rank, shape.alpha, dropout, strength, (), training)


class DyLora(Kind):
    """LoRA that works when it is cut down to fewer ranks, too: some ranks of it are trained at a time."""

    name = "DyLoRA"
    args = ("unit",)

    def __init__(self, args: NetworkArgs) -> None:
        self.unit = args.integer("unit") or 1

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        shape, training = target.shape, LoraTraining(unit=self.unit)
        if shape.rank % self.unit:
            raise ValueError(f"--network_args unit={self.unit}: the rank {shape.rank} cannot be divided by it")
        return LoraAdapter(target.layer, shape.rank, shape.alpha, dropout, strength, (), training)

    def conv_shape(self, args: NetworkArgs, linear: AdapterShape) -> AdapterShape | None:
        shape = super().conv_shape(args, linear)
        if shape is not None and shape != linear:
            raise ValueError(
                "--network_args conv_dim and conv_alpha: DyLoRA has one rank and one alpha for all layers, "
                f"{linear.rank} and {linear.alpha:g} of --network_dim and --network_alpha"
            )
        return shape


class LoHa(Kind):
    """Products of two low-rank matrices, number by number."""

    name = "LoHa"
    args = ("use_tucker",)
    size_args = args

    def __init__(self, args: NetworkArgs) -> None:
        self.tucker = args.boolean("use_tucker") or False

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        shape = target.shape
        tucker = self.tucker if shape.tensors is None else TUCKER[0] in shape.tensors
        return HadamardAdapter(target.layer, shape.rank, shape.alpha, tucker, dropout, strength)


class LoKr(Kind):
    """Kronecker products."""

    name = "LoKr"
    args = ("factor", "use_tucker")
    size_args = args

    def __init__(self, args: NetworkArgs) -> None:
        factor = args.integer("factor", low=-1)
        if factor == 0:
            raise ValueError("--network_args factor=0: expected 1 or more, or -1 for factors as equal as possible")
        self.plan = KroneckerPlan(factor or -1, args.boolean("use_tucker") or False)

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        shape = target.shape
        sizes = planned_sizes(target.layer, shape.rank, self.plan)
        if shape.tensors is not None:
            sizes = {key: size for key, size in shape.tensors.items() if key.startswith("lokr_")}
        return KroneckerAdapter(target.layer, shape.rank, shape.alpha, sizes, dropout, strength)


class Oft(Kind):
    """Turns of the outputs; --network_dim is the number of blocks."""

    name = "OFT"
    args = ("enable_all_linear", "enable_conv")
    size_args = args
    conv_args = ()
    default_alpha = 1e-3
    prefix = "oft_"
    of_text_encoders = False
    has_halves = False

    def __init__(self, args: NetworkArgs) -> None:
        self.with_convs = args.boolean("enable_conv") or False
        self.all_linear = self.with_convs or args.boolean("enable_all_linear") or False

    def make(self, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
        return OrthogonalAdapter(target.layer, target.shape.rank, target.shape.alpha, dropout, strength)

    def covers(self, path: str) -> bool:
        """Attention by default: a layer below a module whose name says so."""
        return self.all_linear or any("attn" in part for part in path.split(".")[:-1])

    def conv_shape(self, args: NetworkArgs, linear: AdapterShape) -> AdapterShape | None:
        return linear if self.with_convs else None


def known_args(kind: type[Kind], of_family: Sequence[str]) -> tuple[str, ...]:
    """The keys of --network_args that a network of this kind knows on the layers of a family."""
    training = [key for key in TRAINING_ARGS if kind.has_halves or not key.startswith("loraplus")]
    return (*kind.conv_args, *of_family, *kind.args, *training)


def refuse_sizes(args: NetworkArgs, keys: Sequence[str]) -> None:
    """ValueError if one of `keys` is given, which the file that a network is made from decides."""
    for key in keys:
        if key in args:
            raise ValueError(f"--network_args {key} has no effect with --dim_from_weights: sizes come from the file")


class AdaptersInFile:
    """The adapters of a file, asked for by the name that a LoRA on a layer has."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._shapes = adapter_shapes(weights)
        self._asked: list[str] = []

    def find(self, name: str) -> tuple[str, AdapterShape] | None:
        """The adapter's own name, and its shape; None if the layer has none."""
        names = (name, *(kind.prefix + name.removeprefix(Kind.prefix) for kind in PREFIXED))
        self._asked += names
        return next(((own, self._shapes[own]) for own in names if own in self._shapes), None)

    def check_rest(self, file: str | None) -> None:
        """Warn of keys that are of no adapter that was asked for; `file` is where they are from.

        Raises:
            ValueError: all of them are.
        """
        foreign = check_known(self._weights, self._asked, file)
        if foreign:
            logger.warning("%s: %d keys belong to no layer, such as %s", file or "weights", len(foreign), foreign[0])


PREFIXED = (Oft,)
"""Kinds whose adapters have names of their own."""

KINDS: tuple[tuple[str, type[Kind]], ...] = (
    ("lora_down.weight", Lora),
    ("hada_w1_a", LoHa),
    ("lokr_w1", LoKr),
    ("lokr_w1_a", LoKr),
    ("oft_blocks", Oft),
)
"""A tensor that every adapter of a kind has in a file."""


def kind_in_file(tensors: Mapping[str, Any]) -> type[Kind]:
    """The kind of an adapter with these tensors."""
    return next(kind for end, kind in KINDS if end in tensors)


def make_adapter(kind: Kind, target: Target, dropout: Dropout, strength: Strength) -> Adapter:
    """An adapter of `kind`, or, for an adapter in a file, of the kind that is there."""
    tensors = target.shape.tensors
    if tensors is not None:
        found = kind_in_file(tensors)
        if found is not Lora and not isinstance(kind, found):
            return found(NetworkArgs({}, (), found.name)).make(target, dropout, strength)
        if found is Lora and isinstance(kind, LoHa | LoKr | Oft):
            return Lora(NetworkArgs({}, (), found.name)).make(target, dropout, strength)
    if target.parts and not isinstance(kind, Lora):
        raise ValueError(f"--network_args split_qkv is for LoRA, and the network is of {kind.name}")
    return kind.make(target, dropout, strength)


def _low_rank(tensors: Mapping[str, Tensor], shape: AdapterShape, weight: Tensor) -> Tensor:
    scale = shape.alpha / shape.rank
    if "dora_scale" in tensors:
        return decomposed_difference(tensors, weight, scale)
    return low_rank_difference(tensors["lora_down.weight"], tensors["lora_up.weight"], scale, weight.shape)


def _hadamard(tensors: Mapping[str, Tensor], shape: AdapterShape, weight: Tensor) -> Tensor:
    return shape.alpha / shape.rank * hadamard_difference(tensors).reshape(weight.shape)


def _kronecker(tensors: Mapping[str, Tensor], shape: AdapterShape, weight: Tensor) -> Tensor:
    whole = "lokr_w1" in tensors and "lokr_w2" in tensors
    numbers = {key: value.float() for key, value in tensors.items()}
    return (1.0 if whole else shape.alpha / shape.rank) * kronecker_difference(numbers, weight.shape)


def _turned(tensors: Mapping[str, Tensor], shape: AdapterShape, weight: Tensor) -> Tensor:
    return turned_difference({**tensors, ALPHA: torch.tensor(shape.alpha)}, weight)


_DIFFERENCES: Mapping[type[Kind], Callable[[Mapping[str, Tensor], AdapterShape, Tensor], Tensor]] = {
    Lora: _low_rank,
    LoHa: _hadamard,
    LoKr: _kronecker,
    Oft: _turned,
}


def difference_in_file(tensors: Mapping[str, Tensor], shape: AdapterShape, weight: Tensor) -> Tensor:
    """What an adapter in a file adds to `weight`, a float32 tensor, at a multiplier of 1.

    `tensors` is by the end of the key, all on the weight's device.
    """
    for unknown in ("dora_scale",) if kind_in_file(tensors) is not Lora else ():
        if unknown in tensors:
            raise ValueError(f"an adapter of kind {kind_in_file(tensors).name} with {unknown} cannot be read")
    return _DIFFERENCES[kind_in_file(tensors)](tensors, shape, weight)
