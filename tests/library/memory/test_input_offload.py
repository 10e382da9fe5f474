from __future__ import annotations

import torch
from torch import Tensor

from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.copier import ElsewhereCopier
from library.memory.input_offload import InputOffload
from tests.library.memory.toys import WIDTH, LateCopier, ParkingSwap, adapt, equal, small_model, steps

HIDDEN = 2 * 3 * WIDTH * 4
"""Bytes of what one block hands to the next."""


def run(offload: InputOffload | None, swapped: int = 0) -> list[Tensor]:
    model = small_model(5)
    if swapped:
        ParkingSwap(model.blocks, range(swapped), LateCopier())
    adapters = adapt(model.blocks)
    checkpoint_blocks(model.blocks, Recompute.ALL, offload)
    return steps(model, adapters)


def test_inputs_that_wait_in_main_memory_change_no_bit() -> None:
    expected = run(None)
    offload = InputOffload(LateCopier(), smallest=1)
    assert equal(run(offload), expected)
    # Of five blocks four have an input with a gradient; three of the four steps have a graph.
    assert offload.moved == 3 * 4 * HIDDEN


def test_they_wait_there_also_while_weights_stream() -> None:
    assert equal(run(InputOffload(LateCopier(), smallest=1), swapped=4), run(None))


def test_small_inputs_stay() -> None:
    offload = InputOffload(LateCopier(), smallest=HIDDEN + 1)
    run(offload)
    assert offload.moved == 0


def test_buffers_are_used_again_and_a_graph_without_backward_leaves_nothing_behind() -> None:
    copier = LateCopier()
    made: list[int] = []
    host = copier.host
    copier.host = lambda size: made.append(size) or host(size)  # type: ignore[method-assign,func-returns-value]
    offload = InputOffload(copier, smallest=1)
    model = small_model(5)
    adapters = adapt(model.blocks)
    checkpoint_blocks(model.blocks, Recompute.ALL, offload)
    steps(model, adapters, 1)
    first = len(made)
    steps(model, adapters, 1)
    assert len(made) == first
    model(torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH))  # no backward
    steps(model, adapters, 1)
    assert len(offload._away) <= 4


def test_for_an_estimate_main_memory_has_no_content() -> None:
    copier = ElsewhereCopier()
    host = copier.host(1 << 40)
    assert host.is_meta
    copier.copy(torch.zeros(4), host, copier.mark())
