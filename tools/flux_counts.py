"""What does a training step of FLUX.1-dev make a GPU do? Counted at full size on tensors without content.

One double and one single block are enough, since all blocks of a kind are alike: LoRA of rank 16 on every linear layer,
4096 image and 512 text tokens (1024 x 1024), batch size 1, bfloat16. What comes before and after the blocks, less than
a hundredth, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from library.memory.activation_plan import ATTENTION_ON_CPU, measured
from library.memory.block_swap import BlockSwap, spread_evenly
from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.copier import ElsewhereCopier
from library.memory.fp8 import Format, Quantizer, Scaling
from library.memory.frozen_layers import attach_frozen_layers, round_weights
from library.memory.host_layers import attach_host_layers
from library.models.architecture import double_and_single_swap_groups
from library.models.flux.stream import DoubleStreamBlock, Modulation, SingleStreamBlock
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter
from step_counts import OperationCounter, make_fake

WIDTH, HEADS, MLP = 3072, 24, 12288
IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
RANK = 16
MIB, GB = 2**20, 1e9
SWAPS = (9, 18, 28, 35)
FORMATS: dict[str, Scaling | None] = {"bf16": None, "fp8_base": Scaling.NONE, "fp8_scaled": Scaling.BLOCK}


@dataclass(frozen=True)
class BlockCounts:
    """One block, forward and backward, recomputation included."""

    kernels: int
    elementwise: int
    """Bytes moved by everything but products."""
    flops: int
    kept: int
    """Bytes kept until backward."""


def block_counts(kind: str, form: str, recompute: Recompute, adapted: bool = True) -> BlockCounts:
    """The counts of a "double" or a "single" block in one of `FORMATS`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    block, inputs = _block(kind, form, adapted, mode)
    flops = [FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) for _ in range(2)]
    with mode, torch.autocast("cpu", torch.bfloat16):
        kept = measured(block.forward, inputs()).kept[recompute]
        checkpoint_blocks([block], recompute)
        with flops[0], OperationCounter() as forward:
            answer = block(*inputs())
        outputs = answer if isinstance(answer, tuple) else (answer,)
    with mode:
        gradients = [torch.empty_like(output) for output in outputs]
        with flops[1], OperationCounter() as backward:
            torch.autograd.backward(outputs, gradients)
    return BlockCounts(
        forward.kernels.total() + backward.kernels.total(),
        forward.elementwise_bytes + backward.elementwise_bytes,
        sum(count.get_total_flops() for count in flops),
        kept,
    )


def step_counts(form: str, recompute: Recompute, adapted: bool = True) -> BlockCounts:
    """The counts of all blocks of one step."""
    double, single = (block_counts(kind, form, recompute, adapted) for kind in ("double", "single"))
    totals = (
        DOUBLE_BLOCKS * getattr(double, field.name) + SINGLE_BLOCKS * getattr(single, field.name)
        for field in fields(BlockCounts)
    )
    return BlockCounts(*totals)


def uploaded_per_step(form: str, blocks_to_swap: int, cpu_modulation: bool = False) -> int:
    """Bytes that come to the device in one step, by the real engine on blocks without content."""
    with torch.device("meta"):
        double = [_Still(_layers("double")) for _ in range(DOUBLE_BLOCKS)]
        single = [_Still(_layers("single")) for _ in range(SINGLE_BLOCKS)]
    blocks: list[nn.Module] = [*double, *single]
    answers = 0
    for block in blocks:
        block.requires_grad_(False).to(torch.bfloat16)
        _round(block, form)
        if cpu_modulation:
            hosted = [part.lin for part in block.modules() if isinstance(part, Modulation)]
            attach_host_layers(hosted, torch.device("meta"), torch.bfloat16)
            answers += sum(layer.bias.nbytes for layer in hosted)  # as many numbers as they answer with
    groups = double_and_single_swap_groups(nn.ModuleList(double), nn.ModuleList(single), blocks_to_swap)
    starts = (0, DOUBLE_BLOCKS)
    streamed = [
        start + place
        for start, group in zip(starts, groups, strict=True)
        for place in spread_evenly(len(group.blocks), group.num_swapped)
    ]
    swap = BlockSwap(blocks, streamed, _Nowhere())
    before = 0
    for _ in range(2):  # the first step begins with empty buffers
        before = swap.loaded
        x = torch.ones(1, requires_grad=True)
        for block in blocks:
            x = block(x)
        x.backward()
    return swap.loaded - before + answers


class _Nowhere(ElsewhereCopier):
    """Neither end has content."""

    def device(self, size: int) -> Tensor:
        return self.host(size)


class _Still(nn.Module):
    """A block that calculates nothing."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


def _layers(kind: str) -> nn.Module:
    made: Callable[..., nn.Module] = DoubleStreamBlock if kind == "double" else SingleStreamBlock
    return made(WIDTH, HEADS, MLP)


def _round(block: nn.Module, form: str) -> None:
    scaling, scales = FORMATS[form], {}
    if scaling is not None:
        quantizer = Quantizer(Format(scaling))
        round_weights(block, quantizer)
        scales = quantizer.scales
    attach_frozen_layers(block, scales, lambda layer: isinstance(layer, nn.Linear))


def _block(kind: str, form: str, adapted: bool, mode: FakeTensorMode) -> tuple[nn.Module, Callable[[], Sequence[Any]]]:
    """A block without content, with adapters in it, and what calculates the tensors that it is called with."""
    with torch.device("meta"):
        block = _layers(kind).requires_grad_(False).to(torch.bfloat16)
    _round(block, form)
    adapters = nn.ModuleList()
    for parent in list(block.modules()) if adapted else ():
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                adapter = LoraAdapter(layer, RANK, float(RANK), Dropout(), Strength())
                stand_in(parent, name, adapter)
                adapters.append(adapter)
    for parameter in adapters.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _make_solid(block)
    make_fake([block, adapters], mode)
    tokens = IMAGE_TOKENS + TEXT_TOKENS
    with mode:
        vector = torch.empty(1, WIDTH, dtype=torch.bfloat16)
        rope = torch.empty(tokens, 1, WIDTH // HEADS // 2, 2)

        def hidden(length: int) -> Tensor:
            return torch.empty(1, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)

        streams = [hidden(IMAGE_TOKENS), hidden(TEXT_TOKENS)] if kind == "double" else [hidden(tokens)]
    layers = [part for part in block.children() if isinstance(part, Modulation)]
    return block, lambda: (*streams, *(layer(vector) for layer in layers), rope, None)


def _make_solid(block: nn.Module) -> None:
    """From the meta device to the CPU, still without memory: nothing touches what a fresh tensor reserves."""
    for module in block.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    table[name] = nn.Parameter(empty, tensor.requires_grad) if name in module._parameters else empty
