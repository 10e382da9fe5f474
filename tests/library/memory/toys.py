"""A small transformer with adapters, and a device that shows every mistake in the order of copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap
from library.memory.frozen_layers import attach_frozen_layers
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter

WIDTH = 8


class Block(nn.Module):
    """A residual block with a modulation, as those of the transformers: two tensors in, two out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(torch.tanh(self.up(self.norm(x) * vec))), vec * 1.0


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        for block in self.blocks:
            x, vec = block(x, vec)
        return x


@dataclass
class LateCopier:
    """A copy arrives when it, or a later one, is waited for and not before; until then its target is full of NaN."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    pending: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def device(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def mark(self) -> None:
        return None

    def copy(self, source: Tensor, target: Tensor, after: Any) -> int:
        target.fill_(255)  # NaN in float32, bfloat16 and float8
        number = len(self.copies)
        self.copies.append((source.data_ptr(), source.numel()))
        self.pending[number] = (source, target)
        return number

    def wait(self, moment: Any) -> None:
        # One stream: what was told first is done first.
        for number in [number for number in self.pending if moment is not None and number <= moment]:
            source, target = self.pending.pop(number)
            target.copy_(source)


class ParkingSwap(BlockSwap):
    """Block swap in which a weight that is away is NaN, so that any use of it poisons the result."""

    def _park(self, index: int) -> None:
        super()._park(index)
        block = self._blocks[index]
        block.stand_in(-2, torch.full_like(block.host, 255))


def adapt(blocks: Sequence[nn.Module], rank: int = 2, dropout: Dropout | None = None) -> nn.ModuleList:
    """LoRA on every linear layer of `blocks`, with numbers in both matrices."""
    adapters = []
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    adapter = LoraAdapter(layer, rank, float(rank), dropout or Dropout(), Strength())
                    nn.init.normal_(adapter.lora_up.weight, std=0.3)
                    stand_in(parent, name, adapter)
                    adapters.append(adapter)
    return nn.ModuleList(adapters).train()


def small_model(count: int, seed: int = 0) -> Model:
    """Frozen, with handles on all linear layers."""
    torch.manual_seed(seed)
    model = Model(count).requires_grad_(False)
    attach_frozen_layers(model, wanted=lambda layer: isinstance(layer, nn.Linear))
    return model


def steps(model: Model, adapters: nn.ModuleList, count: int = 4) -> list[Tensor]:
    """Outputs and gradients of steps of training, each third one without a graph as in validation or a preview."""
    found = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        x, vec = (torch.randn(2, 3, WIDTH, generator=generator) for _ in range(2))
        torch.manual_seed(step)
        if step % 3 == 1:
            with torch.no_grad():
                found.append(model(x, vec))
            continue
        adapters.zero_grad()
        y = model(x, vec)
        y.square().sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in adapters.parameters() if p.grad is not None)]
    return found


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Bit for bit, and every number is one."""
    same = len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return same and not any(tensor.isnan().any() for tensor in ours)


def saved_for_backward(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a calculation, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        kept[alias.untyped_storage()._cdata] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
