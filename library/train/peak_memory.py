"""How much memory one training step needs, found by taking it on tensors without content."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while the mode is on, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and count what it has made; what it was given is not its own."""
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # that is what lies elsewhere
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def let_go(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, let_go)
        self.live += size
        self.peak = max(self.peak, self.live)


def step_peak(
    modules: Iterable[nn.Module], step: Callable[[], Tensor], autocast: torch.dtype | None, times: int = 1
) -> int:
    """Bytes that `step`, which gives a loss, and its backward pass hold at once besides weights and gradients.

    It is taken several `times` where the first one only measures.

    `modules` hold the weights on the meta device; they are replaced by tensors that have a device and no content.
    Memory that a kernel takes for itself while it runs does not show.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the tables of the noise schedule
    _give_fake_weights(modules, mode)
    count = LiveBytes()
    with mode, count:
        for _ in range(times):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = step()
            loss.backward()
            del loss
    return count.peak


def _give_fake_weights(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer; one that is shared stays shared, and gradients are there already."""
    replaced: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in replaced:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                new = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                if tensor.requires_grad:
                    new.grad = torch.zeros(tensor.shape, dtype=tensor.dtype)
            replaced[id(tensor)] = new
            originals.append(tensor)
        return replaced[id(tensor)]

    originals: list[Tensor] = []  # an id is only good while its tensor lives
    for module in modules:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        table[name] = fake(tensor)
