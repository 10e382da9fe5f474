"""Frozen weights that are divided among processes: each keeps a part of every block, and a block is whole in its turn.

torch's fully_shard does it from outside, with hooks: the weights of a block are gathered before it runs and again
before its gradient comes, and let go afterwards. While a block is calculated its layers find whole weights where they
always do, those that look them up again in backward (`FrozenLayer`) as well: backward leaves a block only after all of
its layers. Every process must run the same blocks in the same order, since each waits for the parts of the others.
"Zero: Memory Optimizations Toward Training Trillion Parameter Models", https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

WHOLE_AT_ONCE = 2
"""Blocks: one is calculated with while the next is gathered."""


def divide(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    *,
    apart: Sequence[nn.Module] = (),
    frees_after_forward: bool = True,
    waits_in_main_memory: bool = False,
    fetches_ahead: bool = False,
) -> int:
    """Divide what `model` has frozen among all processes, `blocks` in running order one by one, then the rest.

    `apart` are parts of blocks that are called outside of the forward of their block, and divided by themselves.
    Weights may lie in main memory before; no more than one block at a time comes to `device` whole. What is trained
    stays as it is. Call it last, when networks and everything else stand in the layers. The answer is the bytes of the
    part of this process.
    """
    fsdp: Any = importlib.import_module("torch.distributed.fsdp")  # seconds that runs without it do not need
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = fsdp.CPUOffloadPolicy(device.type == "cuda") if waits_in_main_memory else fsdp.OffloadPolicy()
    whole = {parameter for parameter in model.parameters() if not _can_be_divided(parameter)}
    for parameter in model.parameters():
        data = parameter.detach()
        parameter.data = data.to(device) if parameter in whole else data.contiguous()
    settings = {"mesh": mesh, "offload_policy": policy, "ignored_params": whole}
    for part in (*apart, *blocks, model):
        fsdp.fully_shard(part, reshard_after_forward=frees_after_forward, **settings)
    if fetches_ahead:
        divided: Sequence[Any] = blocks
        for block, following in pairwise(divided):
            block.set_modules_to_forward_prefetch([following])
    parts: list[Any] = [parameter for parameter in model.parameters() if parameter not in whole]
    return sum(part.to_local().nbytes for part in parts)


def bytes_at_once(
    model: nn.Module, blocks: Sequence[nn.Module], processes: int, *, frees_after_forward: bool, in_main_memory: bool
) -> int:
    """About what lies on the device of one of `processes`, of a model without content that is not divided yet."""
    sizes = [weight_bytes(block) for block in blocks]
    everything = weight_bytes(model)
    part = 0 if in_main_memory else -(-everything // processes)
    if not frees_after_forward:
        return part + everything
    rest = everything - sum(sizes)
    return part + min(rest + WHOLE_AT_ONCE * max(sizes, default=0), everything)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of what would be divided."""
    return sum(parameter.nbytes for parameter in module.parameters() if _can_be_divided(parameter))


def _can_be_divided(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad and parameter.dim() > 0
