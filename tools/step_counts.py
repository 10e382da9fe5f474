"""What does a training step make the machine do? Kernels, bytes, FLOPs and scalar reads, counted without a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

FREE = {
    aten._local_scalar_dense, aten._reshape_alias, aten._unsafe_view, aten.empty, aten.empty_like,
    aten.empty_strided, aten.lift_fresh, aten.new_empty, aten.new_empty_strided, aten.resize_, aten.set_,
}  # fmt: skip
"""Operations that start no kernel; views are the others."""

COPIES = {aten._to_copy, aten.clone, aten.copy_, aten.fill_, aten.zero_, aten.zeros_like, aten.ones_like}
"""Elementwise work that torch does not tag as such."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a device while the mode is on, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.elementwise_bytes = 0
        self.scalar_reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            self.scalar_reads += 1
        # Fake tensors ask prim.device for their device.
        if func.is_view or packet in FREE or func.namespace == "prim":
            return out
        self.kernels[str(packet)] += 1
        if torch.Tag.pointwise in func.tags or packet in COPIES:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.elementwise_bytes += sum(touched_bytes(tensor) for tensor in tensors)
        return out


class SavedBytes:
    """Context that adds up the memory kept for the backward pass, each storage once, without `frozen` ones."""

    def __init__(self, frozen: Iterable[Tensor]) -> None:
        self.known = {tensor.untyped_storage()._cdata for tensor in frozen}
        self.kept: list[Tensor] = []
        self.total = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        """Count `tensor` if its storage is new."""
        alias = tensor.detach()
        storage = alias.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(alias)  # a storage that stays cannot lend its address to another
            self.total += storage.nbytes()
        return alias

    def __enter__(self) -> SavedBytes:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


def touched_bytes(tensor: Tensor) -> int:
    """The memory behind `tensor`; an expanded one has less than its shape says."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride != 0 or size == 0 else 1
    return numel * tensor.element_size()


def count_step(loss: Callable[[], Tensor], modules: Iterable[nn.Module]) -> dict[str, int]:
    """The counts of one forward and backward pass; `loss` makes the scalar that is differentiated."""
    frozen = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    flops = FlopCounterMode(display=False), FlopCounterMode(display=False)  # entering one again would reset it
    with flops[0], OperationCounter() as forward, SavedBytes(frozen) as saved:
        value = loss()
    with flops[1], OperationCounter() as backward:
        value.backward()
    return {
        "kernels_forward": forward.kernels.total(),
        "kernels_backward": backward.kernels.total(),
        "elementwise_bytes_forward": forward.elementwise_bytes,
        "elementwise_bytes_backward": backward.elementwise_bytes,
        "flops": sum(mode.get_total_flops() for mode in flops),
        "bytes_saved_for_backward": saved.total,
    }


def make_fake(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer by a fake tensor of its shape; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made = mode.from_tensor(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            if tensor.grad is not None:  # backward adds to a gradient that is there
                fakes[id(tensor)].grad = mode.from_tensor(tensor.grad)
        return fakes[id(tensor)]

    originals: list[Tensor] = []  # kept until the end, so that no two have the same id
    for module in modules:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        originals.append(tensor)
                        tensors[name] = fake(tensor)  # type: ignore[assignment]
