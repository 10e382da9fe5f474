"""Steps of a FLUX.1 transformer of any size with made-up weights: how long, how much memory, how much waiting."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap, settle, spread_evenly
from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.compilation import compile_blocks
from library.memory.copier import Copier, CudaCopier, make_copier
from library.memory.fp8 import Format, Quantizer, Scaling
from library.memory.frozen_layers import attach_frozen_layers
from library.models.architecture import double_and_single_swap_groups
from library.models.attention import AttentionMode
from library.models.flux.model import FluxShape, FluxTransformer
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter

RANK = 16
FULL_SIZE = FluxShape(
    in_channels=64, width=3072, num_heads=24, mlp_width=12288, text_dim=4096, double_blocks=19, single_blocks=38,
    pooled_dim=768, has_guidance=True,
)  # fmt: skip
"""FLUX.1-dev."""
SCALINGS = {"bf16": None, "fp8_base": Scaling.NONE, "fp8_scaled": Scaling.BLOCK}
WARM_UP = 3
"""Steps before the clock runs, in which everything is compiled and allocated."""


@dataclass(frozen=True)
class Variant:
    """One way to run."""

    form: str
    blocks_to_swap: int
    recompute: Recompute
    compiled: bool

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.form}, {self.blocks_to_swap} blocks swapped, {self.recompute.value}{compiled}"


@dataclass(frozen=True)
class Found:
    """What was measured."""

    seconds_per_step: float
    device_bytes: int
    """At most."""
    host_bytes: int
    """Of the process, at the end."""
    waiting: float
    """Share of a step that the device stood waiting for weights."""
    losses: tuple[float, ...]


class TimedCopier(CudaCopier):
    """Measures how long the calculation waits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, moment: torch.cuda.Event) -> None:
        """The stream of the calculation waits, between two marks of time."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        super().wait(moment)
        after.record()
        self.waits.append((before, after))

    def seconds(self) -> float:
        """All waits until now; the device must have come to rest."""
        return sum(before.elapsed_time(after) for before, after in self.waits) / 1e3


def run(
    shape: FluxShape, variant: Variant, device: torch.device, size: tuple[int, int], text: int, steps: int
) -> Found:
    """Train a LoRA on noise for `steps` steps; `size` is rows and columns of patches, `text` the number of tokens."""
    is_gpu = device.type == "cuda"
    copier: Copier = TimedCopier(device) if is_gpu else make_copier(device)
    model, adapters = _model(shape, variant, device, copier)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, fused=is_gpu)
    generator = torch.Generator().manual_seed(0)

    def noise(*sides: int) -> Tensor:
        return torch.randn(sides, generator=generator).to(device, torch.bfloat16)

    tokens = size[0] * size[1]
    img, txt, pooled = noise(1, tokens, shape.in_channels), noise(1, text, shape.text_dim), noise(1, shape.pooled_dim)
    t, guidance = torch.tensor([0.5], device=device), torch.tensor([1.0], device=device)
    losses = []
    started = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            _rest(device)
            if is_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                copier.waits.clear()  # type: ignore[attr-defined]
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = (model(img, txt, t, guidance, pooled, size) - img).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    _rest(device)
    seconds = (time.perf_counter() - started) / steps
    waiting = copier.seconds() / steps / seconds if isinstance(copier, TimedCopier) else 0.0
    memory = torch.cuda.max_memory_allocated(device) if is_gpu else 0
    return Found(seconds, memory, psutil.Process().memory_info().rss, waiting, tuple(float(loss) for loss in losses))


def _rest(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _model(shape: FluxShape, variant: Variant, device: torch.device, copier: Copier) -> tuple[nn.Module, nn.Module]:
    """The transformer with made-up weights, and its adapters."""
    with torch.device("meta"):
        model = FluxTransformer(shape, AttentionMode.SDPA).requires_grad_(False)
    blocks: list[nn.Module] = [*model.double_blocks, *model.single_blocks]
    groups = double_and_single_swap_groups(model.double_blocks, model.single_blocks, variant.blocks_to_swap)
    starts = (0, shape.double_blocks)
    streamed = [
        start + place
        for start, group in zip(starts, groups, strict=True)
        for place in spread_evenly(len(group.blocks), group.num_swapped)
    ]
    away = {id(module) for index in streamed for module in blocks[index].modules()}
    scaling = SCALINGS[variant.form]
    quantizer = None if scaling is None else Quantizer(Format(scaling), ("_blocks",), ("norm",), device)
    torch.manual_seed(0)
    for name, module in model.named_modules():
        place = torch.device("cpu") if id(module) in away else device
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = _made_up(f"{name}.{leaf}", parameter, place, device, quantizer)
    attach_frozen_layers(model, {} if quantizer is None else quantizer.scales, lambda layer: id(layer) in away)
    if streamed:
        settle(model, device, BlockSwap(blocks, streamed, copier).away())
    adapters = _adapted(blocks).to(device)
    if variant.compiled:
        compile_blocks(blocks, "inductor")
    checkpoint_blocks(blocks, variant.recompute)
    return model, adapters


def _made_up(
    name: str, like: Tensor, place: torch.device, maker: torch.device, quantizer: Quantizer | None
) -> nn.Parameter:
    """A weight as large as those of a trained model are, made on `maker`, which is fast."""
    value: Any = torch.empty(like.shape, dtype=torch.bfloat16, device=maker)
    value = value.normal_(std=0.02) if like.dim() > 1 else value.fill_(1.0 if name.endswith("scale") else 0.0)
    value = value.to(place)
    return nn.Parameter(value if quantizer is None else quantizer(name, value), requires_grad=False)


def _adapted(blocks: list[nn.Module]) -> nn.ModuleList:
    adapters = nn.ModuleList()
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    adapters.append(LoraAdapter(layer, RANK, float(RANK), Dropout(), Strength()))
                    stand_in(parent, name, adapters[-1])  # type: ignore[arg-type]
    return adapters
