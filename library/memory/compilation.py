"""Blocks of a model compiled one by one, so that all blocks of a kind share one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.memory.checkpointing import selective_contexts

PROGRAMS = 64
"""How many versions of one block may be compiled: each size of picture is one, with and without a graph another."""


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compile the `forward` of each of `blocks`, which is the one of its class; call it before `checkpoint_blocks`.

    Sizes are compiled in, so that each bucket has a program of its own. The compiled forward has `selective`, the same
    with everything but products recomputed.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
    compiled: dict[type, Callable[..., Any]] = {}
    selective: dict[type, Callable[..., Any]] = {}
    for block in blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=backend, dynamic=False)
            selective[kind] = torch.compile(_recomputed(kind.forward), backend=backend, dynamic=False)
        block.forward = BlockForward(block, compiled[kind], selective[kind])


def known_backends() -> list[str]:
    """The compilers that this installation of torch has."""
    return list(torch._dynamo.list_backends(exclude_tags=()))


class BlockForward:
    """Stands in the place of the forward of a block."""

    def __init__(self, block: nn.Module, whole: Callable[..., Any], selective: Callable[..., Any]) -> None:
        self._whole = functools.partial(whole, block)
        self._selective = functools.partial(selective, block)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        """The answer of the block."""
        return self._whole(*inputs, **settings)

    def selective(self, *inputs: Any) -> Any:
        """The same, with everything but products recomputed in backward."""
        return self._selective(*inputs)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=selective_contexts)

    return run
