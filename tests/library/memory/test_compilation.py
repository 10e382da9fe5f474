from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.compilation import compile_blocks, known_backends
from tests.library.memory.toys import LateCopier, ParkingSwap, adapt, small_model, steps


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(backend: str | None, recompute: Recompute, swapped: int = 0) -> list[Tensor]:
    model = small_model(5)
    if swapped:
        ParkingSwap(model.blocks, range(swapped), LateCopier())
    adapters = adapt(model.blocks)
    if backend is not None:
        compile_blocks(model.blocks, backend)
    checkpoint_blocks(model.blocks, recompute)
    return steps(model, adapters)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("recompute", "swapped"),
    [(Recompute.NOTHING, 0), (Recompute.ELEMENTWISE, 0), (Recompute.ALL, 0), (Recompute.ALL, 3)],
)
def test_all_blocks_share_their_programs_without_a_break_and_without_changing_more_than_the_last_bits(
    backend: str, recompute: Recompute, swapped: int
) -> None:
    expected = run(None, recompute)
    # Autograd of a compiled LoRA takes other products than ours; whether they share all bits is up to the processor.
    for found, other in zip(run(backend, recompute, swapped), expected, strict=True):
        assert (found - other).abs().max() <= 1e-6 * other.abs().max()
    # The first block, whose input has no gradient; all others; passes without a graph.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_compilers_for_searching_faults_are_known_too() -> None:
    assert {"eager", "aot_eager", "inductor"} <= set(known_backends())
