"""What does a training step make the machine do? Kernels, bytes, FLOPs and scalar reads, counted without a clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from library.memory.activation_plan import ATTENTION_ON_CPU
from library.train.peak_memory import LiveBytes

aten = torch.ops.aten

FREE = {
    aten._local_scalar_dense, aten._reshape_alias, aten._unsafe_view, aten.empty, aten.empty_like,
    aten.empty_strided, aten.lift_fresh, aten.new_empty, aten.new_empty_strided, aten.resize_, aten.set_,
}  # fmt: skip
"""Operations that start no kernel; views are the others."""

PRODUCTS: dict[Any, Callable[..., int]] = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    **{operation: shape_wrapper(formula) for operation, formula in ATTENTION_ON_CPU.items()},
}
"""Operations that calculate more than they move, and their FLOPs; all others are elementwise work here."""

WIDENED = (F.layer_norm, F.group_norm)
"""What autocast calculates in float32 on a GPU and not on the CPU, of all that the denoisers do."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a device while the mode is on, those of the backward pass included.

    Attributes:
        elementwise_bytes: read and written by everything that is no product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.elementwise_bytes = 0
        self.flops = 0
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
        if packet in PRODUCTS:
            self.flops += PRODUCTS[packet](*args, **(kwargs or {}), out_val=out)
        else:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.elementwise_bytes += sum(touched_bytes(tensor) for tensor in tensors)
        return out


class AutocastOfGpus(TorchFunctionMode):
    """Lets the autocast of the CPU widen what that of a GPU does."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`."""
        if func in WIDENED and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(value) for value in args)
            kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def touched_bytes(tensor: Tensor) -> int:
    """The memory behind `tensor`; an expanded one has less than its shape says."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride != 0 or size == 0 else 1
    return numel * tensor.element_size()


def count_step(loss: Callable[[], Tensor]) -> dict[str, int]:
    """The counts of one forward and backward pass; `loss` makes the scalar that is differentiated."""
    with LiveBytes() as live, OperationCounter() as forward:
        value = loss()
    kept = live.live
    with OperationCounter() as backward:
        value.backward()
    return {
        "kernels_forward": forward.kernels.total(),
        "kernels_backward": backward.kernels.total(),
        "elementwise_bytes_forward": forward.elementwise_bytes,
        "elementwise_bytes_backward": backward.elementwise_bytes,
        "flops": forward.flops + backward.flops,
        "bytes_kept_for_backward": kept,
    }


def make_fake(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer by a fake tensor of its shape on the CPU; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
                if tensor.grad is not None:  # backward adds to a gradient that is there
                    fakes[id(tensor)].grad = torch.empty(tensor.shape, dtype=tensor.grad.dtype)
        return fakes[id(tensor)]

    originals: list[Tensor] = []  # kept until the end, so that no two have the same id
    for module in modules:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        originals.append(tensor)
                        tensors[name] = fake(tensor)  # type: ignore[assignment]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
