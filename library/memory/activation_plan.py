"""Which blocks keep their activations, which only products, which nothing, from the memory that there is.

A block is measured the first time that it is called with inputs of some shapes: on tensors without content, so that it
costs neither memory nor time of the device. Until every block has been measured, and until the memory is known, all are
recomputed; the next pass with the same shapes follows a plan.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from library.memory.checkpointing import PRODUCTS, Recompute

logger = logging.getLogger(__name__)

OPERATIONS_PER_BYTE = 150
"""Of a GPU in 16 bits: what it calculates in products while it moves one byte; 155 on an RTX 4090, 140 on an H200."""
ATTENTION_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *rest, **more: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *rest, **more: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
"""What torch's counter of operations does not know."""
GAPS = 0.05
"""Part of what is kept that lies in gaps between tensors."""


@dataclass(frozen=True)
class Cost:
    """What one block costs by how much of it is recomputed."""

    kept: dict[Recompute, int]
    """Bytes kept until backward."""
    effort: dict[Recompute, float]
    """Work that is done a second time, in bytes moved."""


@dataclass(frozen=True)
class Plan:
    """A choice for each block."""

    choices: tuple[Recompute, ...]
    kept: int
    """Bytes that all blocks keep."""
    work: int
    """Bytes that the largest of the blocks that are recomputed holds while it is."""
    effort: float
    """Share of the work of all blocks that is done a second time."""

    def __str__(self) -> str:
        counts = Counter(self.choices)
        parts = ", ".join(f"{counts[choice]} {choice.value}" for choice in Recompute if counts[choice])
        return (
            f"of {len(self.choices)} blocks {parts}; {self.kept / 1e9:.2f} GB are kept, one block at work takes "
            f"{self.work / 1e9:.2f} GB, {self.effort:.0%} of the forward pass is done twice"
        )


def plan_blocks(costs: Sequence[Cost], budget: int, allowed: Sequence[frozenset[Recompute]] | None = None) -> Plan:
    """The choices that recompute least while everything kept, and one block at work, stay within `budget` bytes.

    Starting with everything recomputed, the step that saves most work for its bytes is taken as long as there is one
    that fits; of equal blocks the last first, whose activations are needed for the shortest time.
    """
    choices = [Recompute.ALL] * len(costs)
    limits = allowed or [frozenset(Recompute)] * len(costs)
    while True:
        best: tuple[float, int, Recompute] | None = None
        for index, (cost, now) in enumerate(zip(costs, choices, strict=True)):
            for other in limits[index]:
                saved, more = cost.effort[now] - cost.effort[other], cost.kept[other] - cost.kept[now]
                if saved <= 0 or _total(costs, [*choices[:index], other, *choices[index + 1 :]]) > budget:
                    continue
                candidate = (saved / max(more, 1), index, other)
                if best is None or candidate[:2] > best[:2]:
                    best = candidate
        if best is None:
            break
        choices[best[1]] = best[2]
    whole = sum(cost.effort[Recompute.ALL] for cost in costs)
    again = sum(cost.effort[choice] for cost, choice in zip(costs, choices, strict=True))
    return Plan(tuple(choices), _kept(costs, choices), _work(costs, choices), again / whole if whole else 0.0)


class ActivationPlan:
    """Measures the blocks of one model as they run, and answers each with what to do.

    `budget` is told what is needed when all blocks are recomputed, and answers with the bytes that may be used, or with
    None as long as it does not know.

    Attributes:
        plans: shapes of the inputs of the first block -> plan.
    """

    def __init__(
        self,
        forwards: Sequence[Callable[..., Any]],
        budget: Callable[[int], int | None],
        allowed: Sequence[frozenset[Recompute]] | None = None,
    ) -> None:
        self._forwards = list(forwards)
        self._budget = budget
        self._allowed = allowed
        self._costs: dict[Any, dict[int, Cost]] = {}
        self._shapes: Any = None
        self.plans: dict[Any, Plan] = {}

    def choose(self, index: int, inputs: Sequence[Any]) -> Recompute:
        """What the block `index` is to do with `inputs`; the first block begins a pass."""
        if index == 0:
            self._shapes = tuple(_shape(value) for value in tree_leaves(inputs))
            self._plan()
        plan = self.plans.get(self._shapes)
        if plan is not None:
            return plan.choices[index]
        costs = self._costs.setdefault(self._shapes, {})
        if index not in costs:
            costs[index] = measured(self._forwards[index], inputs)
        return Recompute.ALL

    def _plan(self) -> None:
        costs = self._costs.get(self._shapes, {})
        if self._shapes in self.plans or len(costs) < len(self._forwards):
            return
        in_order = [costs[index] for index in range(len(costs))]
        budget = self._budget(_total(in_order, [Recompute.ALL] * len(in_order)))
        if budget is None:
            return
        plan = plan_blocks(in_order, budget, self._allowed)
        self.plans[self._shapes] = plan
        logger.info("activations within %.2f GB: %s", budget / 1e9, plan)


def measured(forward: Callable[..., Any], inputs: Sequence[Any]) -> Cost:
    """What a block costs, by running it on tensors without content."""
    mode = detect_fake_mode(tree_leaves(inputs)) or FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FakeTensor):
            return value.detach().requires_grad_(value.requires_grad)
        made = mode.from_tensor(value.detach())
        return made.requires_grad_(value.requires_grad)

    hollow = tree_map(fake, list(inputs))
    given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(hollow) if isinstance(tensor, Tensor)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        if alias.untyped_storage()._cdata not in given and not isinstance(tensor, torch.nn.Parameter):
            kept[alias.untyped_storage()._cdata] = alias
        return alias

    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)
    with (
        mode,
        torch.enable_grad(),
        _fresh_autocast(hollow),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        with flops, _Traffic() as traffic:
            forward(*hollow)
    into = sum(value.nbytes for value in hollow if isinstance(value, Tensor) and value.requires_grad)
    moved, products = float(traffic.moved), flops.get_total_flops() / OPERATIONS_PER_BYTE
    everything = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Cost(
        {Recompute.NOTHING: into + everything, Recompute.ELEMENTWISE: into + traffic.products, Recompute.ALL: into},
        {Recompute.NOTHING: 0.0, Recompute.ELEMENTWISE: moved, Recompute.ALL: moved + products},
    )


def _fresh_autocast(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Autocast as it is, without its memory of cast weights: those without content must not be found again later."""
    kind = next((value.device.type for value in inputs if isinstance(value, Tensor)), "cpu")
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


class _Traffic(TorchDispatchMode):
    """Bytes that elementwise work moves, and bytes that products answer with."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.products = 0
        self._changed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func in PRODUCTS:
            self.products += sum(tensor.nbytes for tensor in tensors)
        elif torch.Tag.pointwise in func.tags or func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*read, *tensors))
        return out


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _kept(costs: Sequence[Cost], choices: Sequence[Recompute]) -> int:
    return int((1 + GAPS) * sum(cost.kept[choice] for cost, choice in zip(costs, choices, strict=True)))


def _work(costs: Sequence[Cost], choices: Sequence[Recompute]) -> int:
    """What the largest block that is recomputed holds besides what it has kept."""
    works = [cost.kept[Recompute.NOTHING] - cost.kept[choice] for cost, choice in zip(costs, choices, strict=True)]
    return max(works, default=0)


def _total(costs: Sequence[Cost], choices: Sequence[Recompute]) -> int:
    return _kept(costs, choices) + _work(costs, choices)
