"""What is chosen for a device with so much memory: blocks that stay, memory for activations, and advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.flags.dataset import CacheFlags
from library.flags.run import AttentionFlags, LargeModelFlags, MemoryFlags, PrecisionFlags
from library.flags.settings import Settings
from library.memory.block_swap import BlockSwap
from library.train.memory import MemoryRoom, most_swapped, never_needed
from library.train.out_of_memory import advice
from tests.library.memory.toys import LateCopier, small_model

BLOCK = 2 * 512
"""Bytes of the two matrices of one block."""
GB = 10**9


@pytest.mark.parametrize(
    ("free", "total", "reserved", "peak", "unused"),
    [
        (10 * GB, 24 * GB, 12 * GB, 12 * GB, 8.8 * GB),  # a twentieth of all of it is left alone
        (10 * GB, 24 * GB, 13 * GB, 12 * GB, 9.8 * GB),  # gaps of torch's own can be used
        (1 * GB, 24 * GB, 22 * GB, 22 * GB, 0),  # less is free than is to be left alone
        (0, 8 * GB, 7 * GB, 7 * GB, 0),
        (80 * GB, 80 * GB, 0, 0, 76 * GB),
    ],
)
def test_memory_that_nothing_has_needed(free: int, total: int, reserved: int, peak: int, unused: float) -> None:
    assert never_needed(free, total, reserved, peak) == unused


def room_of(
    monkeypatch: pytest.MonkeyPatch, swapped: int | str, activations: str | None, free: int
) -> tuple[MemoryRoom, BlockSwap]:
    """The room of a run with six swapped blocks, on a device whose first step leaves `free` bytes."""
    flags = Settings.of(MemoryFlags(activation_memory=activations), LargeModelFlags(blocks_to_swap=swapped))
    arch: Any = None
    room = MemoryRoom(flags, arch, torch.float32, torch.device("cpu"))
    room.streams = BlockSwap(small_model(6).blocks, range(6), LateCopier())
    monkeypatch.setattr(room, "_free", lambda: free)
    return room, room.streams


@pytest.mark.parametrize(
    ("swapped", "activations", "free", "still_swapped"),
    [
        ("auto", None, 0, [0, 1, 2, 3, 4, 5]),
        ("auto", None, BLOCK - 1, [0, 1, 2, 3, 4, 5]),
        ("auto", None, BLOCK, [0, 1, 2, 4, 5]),
        ("auto", None, 3 * BLOCK + 1, [0, 2, 4]),  # what stays is spread evenly
        ("auto", None, 5 * BLOCK, [2]),
        ("auto", None, 6 * BLOCK, []),
        ("auto", None, 1 << 62, []),
        ("auto", "3", 6 * BLOCK, []),
        ("auto", "auto", 6 * BLOCK, [0, 1, 2, 3, 4, 5]),  # what is free is for activations
        (6, None, 6 * BLOCK, [0, 1, 2, 3, 4, 5]),  # a number is meant as it is
        (6, "auto", 6 * BLOCK, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_as_many_blocks_stay_as_the_first_step_has_left_room_for(
    monkeypatch: pytest.MonkeyPatch, swapped: int | str, activations: str | None, free: int, still_swapped: list[int]
) -> None:
    room, streams = room_of(monkeypatch, swapped, activations, free)
    room.after_update()
    assert streams.order == still_swapped
    monkeypatch.setattr(room, "_free", lambda: 1 << 62)
    room.after_update()
    assert streams.order == still_swapped, "it is decided once"


@pytest.mark.parametrize(
    ("activations", "free", "before", "after"),
    [
        ("auto", 5 * GB, None, 7 * GB),  # two are in use when all is recomputed, and that is not counted as free
        ("auto", 0, None, 2 * GB),
        ("3.5", 5 * GB, 3.5 * GB, 3.5 * GB),
        ("0", 5 * GB, 0, 0),
    ],
)
def test_memory_for_activations_is_a_number_or_all_that_the_first_step_has_left_free(
    monkeypatch: pytest.MonkeyPatch, activations: str, free: int, before: float | None, after: float
) -> None:
    room, _ = room_of(monkeypatch, 6, activations, free)
    assert room._budget(2 * GB) == before
    room.after_update()
    assert room._budget(2 * GB) == after


def test_auto_begins_with_the_most_blocks_that_the_model_can_do_without() -> None:
    def groups_of(number: int) -> list[Any]:
        if number > 35:
            raise ValueError("too many")
        return [number]

    assert most_swapped(groups_of, 57) == [35]
    assert most_swapped(groups_of, 12) == [12]
    with pytest.raises(ValueError, match="not supported"):
        most_swapped(refused, 3)


def refused(number: int) -> list[Any]:
    raise ValueError("--blocks_to_swap is not supported for this")


@pytest.mark.parametrize(
    ("large", "activations", "first"),
    [
        (LargeModelFlags(blocks_to_swap="auto", fp8_scaled=True), "auto", "--activation_memory with a number"),
        (LargeModelFlags(blocks_to_swap="auto", fp8_scaled=True), "6", "a smaller --activation_memory"),
        (LargeModelFlags(blocks_to_swap="auto", fp8_scaled=True), None, "--gradient_checkpointing"),
        (LargeModelFlags(fp8_scaled=True), "6", "--blocks_to_swap=auto"),
        (LargeModelFlags(), "6", "--fp8_scaled"),
    ],
)
def test_where_it_is_still_too_little_the_next_thing_to_do_is_named(
    large: LargeModelFlags, activations: str | None, first: str
) -> None:
    done = (CacheFlags(cache_latents=True), PrecisionFlags(mixed_precision="bf16"), AttentionFlags(sdpa=True))
    settings = Settings.of(*done, large, MemoryFlags(activation_memory=activations))
    lines = advice(settings, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")).splitlines()
    assert lines[1].startswith("the memory of the device has run out")
    assert lines[-1].startswith(f"out of memory; try this first: {first}")


def test_weights_that_wait_in_main_memory_are_named_when_it_runs_out() -> None:
    said = advice(Settings.of(LargeModelFlags(blocks_to_swap=9, cpu_modulation=True)), MemoryError())
    assert "without --cpu_modulation" in said and "a smaller --blocks_to_swap" in said
