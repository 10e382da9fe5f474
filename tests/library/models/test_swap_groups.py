from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from library.models.architecture import SwapGroup, double_and_single_swap_groups, one_swap_group


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Identity() for _ in range(count))


def groups(lists: dict[str, int], number: int) -> list[SwapGroup]:
    if len(lists) == 1:
        return one_swap_group(blocks(*lists.values()), number)
    double, single = lists.values()
    return double_and_single_swap_groups(blocks(double), blocks(single), number)


@pytest.mark.parametrize("family", ["flux", "chroma", "hunyuan_image", "lumina"])
def test_swapped_blocks_are_shared_out_as_recorded(facts: Path, family: str) -> None:
    recorded = json.loads((facts / "block_swap.json").read_text(encoding="utf-8"))[family]
    splits = recorded["split [double, single] or [main] by blocks_to_swap"]
    for number, shares in splits.items():
        assert [group.num_swapped for group in groups(recorded["lists"], int(number))] == shares
    assert sum(len(group.blocks) for group in groups(recorded["lists"], 1)) == sum(recorded["lists"].values())


@pytest.mark.parametrize("family", ["flux", "hunyuan_image", "lumina"])
def test_more_than_the_model_can_swap_is_an_error_that_says_how_many_it_can(facts: Path, family: str) -> None:
    recorded = json.loads((facts / "block_swap.json").read_text(encoding="utf-8"))[family]
    most = recorded["maximum"]
    with pytest.raises(ValueError, match=rf"--blocks_to_swap {most + 1}: this model has .* can swap {most} at most"):
        groups(recorded["lists"], most + 1)
