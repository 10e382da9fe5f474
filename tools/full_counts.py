"""What does a training step of a model at full size make a GPU do? Counted on tensors without content."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from demo_checkpoint import Shapes
from library.memory.block_swap import BlockSwap
from library.memory.copier import ElsewhereCopier
from library.memory.host_layers import attach_host_layers
from made_up_run import META, Family, MadeUpRun, Size, Variant, made_up_model
from networks.core.lora_adapter import AdaptedConv2d, AdaptedLinear
from step_counts import AutocastOfGpus, count_step, make_fake

Counts = dict[str, int]
WHOLE = "step"


def counts_of_step(family: Family, variant: Variant, adapted: bool = True) -> dict[str, Counts]:
    """What a whole step costs, "step", and of it each block of the lists that repeat.

    Of these two blocks are counted at most: every further one adds what the second does.
    """
    lengths = {name: _length(family.full.shapes, name) for name in family.repeated}
    ones = dict.fromkeys(lengths, 1)
    first = counted(family, shortened(family.full, ones), variant, adapted)
    found = {WHOLE: dict(first)}
    for name, length in lengths.items():
        second = counted(family, shortened(family.full, ones | {name: 2}), variant, adapted)
        found[name] = {key: second[key] - first[key] for key in first}
        for key, value in found[name].items():
            found[WHOLE][key] += (length - 1) * value
    return found


def counted(family: Family, size: Size, variant: Variant, adapted: bool = True) -> Counts:
    """What a step of this size costs, operation by operation."""
    run = MadeUpRun(family, size, variant, META)
    for parameter in run.trained.network.parameters():
        parameter.grad = torch.empty_like(parameter)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the batch, and tables of the process
    make_fake([run.models.denoiser, *run.trained.modules()], mode)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run.loss(run.batch)

    with mode, AutocastOfGpus():
        if adapted:
            return count_step(loss)
        with _bare(run):
            return count_step(loss)


def uploaded_per_step(family: Family, variant: Variant) -> int:
    """Bytes that come to the device in one step, by the real engine on blocks without content."""
    model = made_up_model(family, family.full, variant, META)
    hosted: list[Any] = model.room.hosted
    answers = sum(layer.bias.nbytes for layer in hosted)  # as many numbers as they answer with
    attach_host_layers(hosted, META, torch.bfloat16)
    blocks = model.arch.blocks(model.denoiser)
    for block in blocks:
        block.forward = _still
    swap = BlockSwap(blocks, model.room.streamed, _Nowhere())
    before = 0
    for _ in range(2):  # the first step begins with empty buffers
        before = swap.loaded
        x = torch.ones(1, requires_grad=True)
        for block in blocks:
            x = block(x)
        x.backward()
    return swap.loaded - before + answers


def shortened(size: Size, lengths: Mapping[str, int]) -> Size:
    """The same with so many blocks of each list at most."""

    def stays(key: str) -> bool:
        found = {name: re.search(rf"\b{name}\.(\d+)\.", key) for name in lengths}
        return all(match is None or int(match[1]) < lengths[name] for name, match in found.items())

    return replace(size, shapes={key: shape for key, shape in size.shapes.items() if stays(key)})


def _length(shapes: Shapes, name: str) -> int:
    return 1 + max(int(match[1]) for key in shapes if (match := re.search(rf"\b{name}\.(\d+)\.", key)))


@contextmanager
def _bare(run: MadeUpRun) -> Iterator[None]:
    """While the context lasts there are no adapters, but gradients go as far back as with them."""

    def begin(module: Any, inputs: Any, answer: Tensor) -> None:
        if torch.is_grad_enabled() and not answer.requires_grad:
            answer.requires_grad_()

    layers = [layer for layer in run.models.denoiser.modules() if isinstance(layer, AdaptedLinear | AdaptedConv2d)]
    hooks = [layer.register_forward_hook(begin) for layer in layers]
    with run.trained.off():
        yield
    for hook in hooks:
        hook.remove()


def _still(x: Tensor) -> Tensor:
    """A block that calculates nothing."""
    return x * 1.0


class _Nowhere(ElsewhereCopier):
    """Neither end has content."""

    def device(self, size: int) -> Tensor:
        return self.host(size)
