from __future__ import annotations

import pytest
import torch
from torch import nn

from library.memory.block_swap import BlockSwap, settle, spread_evenly
from library.memory.checkpointing import Recompute, checkpoint_blocks
from library.memory.copier import PlainCopier
from networks.core.adapter import Dropout
from tests.library.memory.toys import LateCopier, Model, ParkingSwap, adapt, equal, small_model, steps

BLOCK_BYTES = 2 * 512
"""Two matrices of 8 x 16 in float32, each of them 512 bytes."""


def run(count: int, swapped: int, first_adapted: int, recompute: Recompute) -> tuple[list[torch.Tensor], LateCopier]:
    model, copier = small_model(count), LateCopier()
    if swapped:
        ParkingSwap(model.blocks, spread_evenly(count, swapped), copier)
    adapters = adapt(model.blocks[first_adapted:])
    checkpoint_blocks(model.blocks, recompute)
    return steps(model, adapters), copier


@pytest.mark.parametrize("count", [4, 7, 12])
@pytest.mark.parametrize("first_adapted", [0, 1, 3])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_any_number_of_swapped_blocks_gives_the_same_bits_as_none(
    count: int, first_adapted: int, recompute: Recompute
) -> None:
    expected, _ = run(count, 0, first_adapted, recompute)
    for swapped in range(1, count + 1):
        found, _ = run(count, swapped, first_adapted, recompute)
        assert equal(found, expected), f"{swapped} of {count} blocks"


@pytest.mark.parametrize("recompute", list(Recompute))
def test_recomputation_changes_no_bit(recompute: Recompute) -> None:
    expected, _ = run(5, 0, 0, Recompute.NOTHING)
    assert equal(run(5, 0, 0, recompute)[0], expected)


def test_frozen_weights_are_never_copied_back_and_each_step_loads_a_block_twice_at_most() -> None:
    model, copier = small_model(12), LateCopier()
    swap = BlockSwap(model.blocks, spread_evenly(12, 6), copier)
    adapters = adapt(model.blocks)
    loaded = []
    for _ in range(3):
        before = swap.loaded
        steps(model, adapters, 1)
        loaded.append(swap.loaded - before)
    # Of six blocks two are there at each turn of the direction: 2 * (6 - 2) loads a step after the first.
    assert loaded == [(2 + 4 + 4) * BLOCK_BYTES, 8 * BLOCK_BYTES, 8 * BLOCK_BYTES]
    originals = {block.host.data_ptr() for block in swap._blocks.values()}
    assert {source for source, _ in copier.copies} <= originals


def test_the_next_block_is_on_its_way_before_the_running_one_begins() -> None:
    model, copier = small_model(6), LateCopier()
    swap = BlockSwap(model.blocks, range(6), copier)
    order = {block.host.data_ptr(): index for index, block in swap._blocks.items()}
    begun: list[list[int]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: begun.append([order[source] for source, _ in copier.copies]))
    adapters = adapt(model.blocks)
    steps(model, adapters, 1)
    assert begun == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [order[source] for source, _ in copier.copies] == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]


def test_streamed_blocks_are_spread_evenly() -> None:
    assert spread_evenly(38, 2) == [9, 28]
    assert spread_evenly(6, 6) == [0, 1, 2, 3, 4, 5]
    for total in (19, 38, 57):
        for chosen in range(1, total + 1):
            places = spread_evenly(total, chosen)
            gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
            assert len(set(places)) == chosen and max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_block_that_comes_to_stay_is_not_loaded_again() -> None:
    expected, _ = run(6, 0, 0, Recompute.NOTHING)
    model = small_model(6)
    swap = ParkingSwap(model.blocks, range(6), LateCopier())
    adapters = adapt(model.blocks)
    steps(model, adapters, 2)
    for index in (1, 4, 5):
        swap.keep(index)
    assert equal(steps(model, adapters), expected)
    assert swap.order == [0, 2, 3]


def test_dropout_in_the_adapters_is_the_same_in_the_second_computation() -> None:
    def found(recompute: Recompute, swapped: int) -> list[torch.Tensor]:
        model = small_model(4)
        ParkingSwap(model.blocks, spread_evenly(4, swapped) if swapped else (), LateCopier())
        adapters = adapt(model.blocks, dropout=Dropout(neuron=0.3, rank=0.2))
        checkpoint_blocks(model.blocks, recompute)
        return steps(model, adapters)

    expected = found(Recompute.NOTHING, 0)
    assert equal(found(Recompute.ALL, 3), expected) and equal(found(Recompute.ELEMENTWISE, 3), expected)


class Keeper(nn.Module):
    """An adapter of another kind, which multiplies the weight and so lets autograd keep it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8, 1))
        self.parameters_of_layer = layer._parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.parameters_of_layer["weight"] * self.factor)


def test_a_weight_that_somebody_kept_and_that_was_overwritten_is_an_error_and_no_wrong_gradient() -> None:
    model = small_model(6)
    BlockSwap(model.blocks, range(6), PlainCopier())
    keepers = nn.ModuleList(Keeper(block.down) for block in model.blocks)
    for block, keeper in zip(model.blocks, keepers, strict=True):
        block.down.forward = keeper.forward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(model, keepers, 1)


def test_where_all_is_recomputed_a_kept_weight_is_read_while_it_is_there() -> None:
    found = []
    for streamed in ((), range(6)):
        model = small_model(6)
        BlockSwap(model.blocks, streamed, PlainCopier())
        keepers = nn.ModuleList(Keeper(block.down) for block in model.blocks)
        for block, keeper in zip(model.blocks, keepers, strict=True):
            block.down.forward = keeper.forward
        checkpoint_blocks(model.blocks, Recompute.ALL)
        found.append(steps(model, keepers))
    assert equal(*found)


def test_what_is_not_streamed_goes_to_the_device_and_what_is_away_can_still_be_read() -> None:
    model: Model = small_model(4)
    weights = [block.up.weight.clone() for block in model.blocks]
    swap = BlockSwap(model.blocks, [1, 2], PlainCopier())
    settle(model, torch.device("cpu"), swap.away())
    assert swap.sizes() == {1: BLOCK_BYTES, 2: BLOCK_BYTES} and swap.buffer_bytes() == 2 * BLOCK_BYTES
    assert all(torch.equal(block.up.weight, weight) for block, weight in zip(model.blocks, weights, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_gpu_gives_the_same_numbers_with_and_without_swapped_blocks(recompute: Recompute) -> None:
    from library.memory.copier import CudaCopier

    device = torch.device("cuda")

    def found(swapped: int) -> list[torch.Tensor]:
        model = small_model(8)
        swap = BlockSwap(model.blocks, spread_evenly(8, swapped) if swapped else (), CudaCopier(device))
        settle(model, device, swap.away())
        adapters = adapt(model.blocks).to(device)
        checkpoint_blocks(model.blocks, recompute)
        with torch.device(device):
            return [tensor for _ in range(20) for tensor in steps(model, adapters)]

    with torch.autocast("cuda", torch.bfloat16):
        assert equal(found(6), found(0))
