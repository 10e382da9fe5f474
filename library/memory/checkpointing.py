"""What of a block is kept for backward, the rest being computed again: everything, products, or only its inputs.

Attached from outside, by replacing the `forward` of each block; always non-reentrant, so that nothing needs a gradient
that would not have one: blocks before the first trained layer are not differentiated.
"Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from library.memory.frozen_layers import FrozenLayer, frozen_layers
from library.memory.input_offload import InputOffload


class Recompute(Enum):
    """How much of a block is computed a second time, in backward."""

    NOTHING = "keep everything"
    ELEMENTWISE = "keep products, recompute the rest"
    """Results of matrix products, convolutions and attention are kept; what lies between them is cheap."""
    ALL = "recompute all"


Policy = Callable[[Sequence[Any]], Recompute]
"""Answers the inputs of a block with what to do about it."""


@runtime_checkable
class CompiledForward(Protocol):
    """A forward that is compiled, whose products can only be kept by the compiler."""

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        """The answer of the block."""
        ...

    def selective(self, *inputs: Any) -> Any:
        """The same, with everything but products recomputed in backward."""
        ...


class Checkpointed:
    """Stands in the place of the forward of a block, which must take its tensors by position.

    Attributes:
        policy: decides at each call that has a graph.
    """

    def __init__(self, block: nn.Module, policy: Policy, offload: InputOffload | None = None) -> None:
        self.inside: Callable[..., Any] = block.forward
        self.policy = policy
        self._offload = offload
        self._layers = [layer for _, layer in frozen_layers(block)]
        self._contexts = functools.partial(selective_contexts, self._layers)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        """The answer of the block; `settings` are no tensors."""
        inside = functools.partial(self.inside, **settings) if settings else self.inside
        choice = self.policy(inputs) if torch.is_grad_enabled() else Recompute.NOTHING
        if choice is Recompute.NOTHING:
            return inside(*inputs)
        if choice is Recompute.ELEMENTWISE and isinstance(self.inside, CompiledForward):
            return self.inside.selective(*inputs)
        if choice is Recompute.ELEMENTWISE:
            return checkpoint(inside, *inputs, use_reentrant=False, context_fn=self._contexts)
        with nullcontext() if self._offload is None else self._offload.of(inputs):
            return checkpoint(inside, *inputs, use_reentrant=False)


def checkpoint_blocks(
    blocks: Sequence[nn.Module], policy: Policy | Recompute = Recompute.ALL, offload: InputOffload | None = None
) -> None:
    """Attach `policy` to each of `blocks`; call it once their layers are final, networks included."""
    choose: Policy = (lambda _: policy) if isinstance(policy, Recompute) else policy
    for block in blocks:
        block.forward = Checkpointed(block, choose, offload)


def selective_contexts(
    layers: Sequence[FrozenLayer] = (),
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of the first pass and of the second, in which products answer with what they gave in the first.

    Frozen weights of `layers` are not looked up in the second pass, since the products that read them are known.
    """
    if torch.compiler.is_compiling():
        first, second = create_selective_checkpoint_contexts(_choose, allow_cache_entry_mutation=True)
        return first, second
    kept: deque[tuple[Any, Any]] = deque()
    return _FirstPass(kept), _SecondPass(kept, layers)


class _Pass(TorchDispatchMode):
    """Tells apart what is kept and what is done again.

    A product that something is added to in place, as a LoRA does, is kept as it is afterwards; so whatever changes a
    kept tensor must not be done again either.
    """

    def __init__(self, kept: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self._kept = kept
        self._storages: set[int] = set()

    def _is_kept(self, func: Any, args: tuple[Any, ...]) -> bool:
        if not func._schema.is_mutable:
            return func in PRODUCTS
        return bool(args) and isinstance(args[0], Tensor) and args[0].untyped_storage()._cdata in self._storages

    def _remember(self, out: Any) -> None:
        self._storages.update(leaf.untyped_storage()._cdata for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


class _FirstPass(_Pass):
    """Keeps what products give."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._is_kept(func, args):
            # A tensor without the graph that autograd is about to give this one.
            self._kept.append((func, tree_map_only(Tensor, Tensor.detach, out)))
            self._remember(out)
        return out


class _SecondPass(_Pass):
    """Answers with what was kept, in the same order; frozen weights of `layers` are not looked up meanwhile."""

    def __init__(self, kept: deque[tuple[Any, Any]], layers: Sequence[FrozenLayer]) -> None:
        super().__init__(kept)
        self._layers = layers

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._is_kept(func, args):
            return func(*args, **(kwargs or {}))
        if not self._kept or self._kept[0][0] is not func:
            raise RuntimeError("a block calculated something else the second time; recompute all of it instead")
        out = self._kept.popleft()[1]
        self._remember(out)
        return out

    def __enter__(self) -> Any:
        for layer in self._layers:
            layer.idle = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.idle = False
        super().__exit__(*error)


def _choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def _existing(*names: str) -> frozenset[Any]:
    """Those of the operations that this release of torch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        if hasattr(torch.ops.aten, packet):
            found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return frozenset(found)


PRODUCTS = _existing(
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_mm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""What is worth keeping: matrix products, convolutions, attention."""
