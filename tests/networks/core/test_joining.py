"""Joined adapters have the effect of their parts, and parts that of the joined one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from networks.core.joining import block_diagonal, join_parts, split_parts
from networks.core.lora_file import LowRankPair

ROWS = [6, 6, 10]


def part(rows: int, rank: int = 2, alpha: float = 1.0, seed: int = 0) -> LowRankPair:
    generator = torch.Generator().manual_seed(100 * rows + 10 * rank + seed)
    return LowRankPair(
        torch.randn(rank, 5, generator=generator), torch.randn(rows, rank, generator=generator), float(alpha)
    )


def effect(pair: LowRankPair | None, rows: int) -> Tensor:
    if pair is None:
        return torch.zeros(rows, 5)
    return pair.difference(torch.Size((rows, 5)))


def test_parts_of_any_rank_and_alpha_keep_their_effect_and_alpha_is_the_rank() -> None:
    parts = [part(6, 2, 1.0), part(6, 3, 6.0), part(10, 1, 0.5)]
    joined = join_parts(parts, ROWS)
    assert (joined.rank, joined.alpha) == (6, 6.0)
    assert torch.allclose(effect(joined, 22), torch.cat([effect(p, r) for p, r in zip(parts, ROWS)]), atol=1e-6)


def test_a_missing_part_has_no_effect_on_its_rows() -> None:
    parts = [None, part(6), None]
    joined = join_parts(parts, ROWS)
    assert joined.rank == 2
    assert torch.allclose(effect(joined, 22), torch.cat([effect(p, r) for p, r in zip(parts, ROWS)]), atol=1e-6)


def test_parts_of_one_down_keep_the_rank() -> None:
    first = part(6)
    parts = [first, LowRankPair(first.down, part(6, seed=1).up, 4.0), LowRankPair(first.down, part(10).up, 1.0)]
    joined = join_parts(parts, ROWS)
    assert joined.rank == 2
    assert torch.allclose(effect(joined, 22), torch.cat([effect(p, r) for p, r in zip(parts, ROWS)]), atol=1e-6)


def test_what_was_joined_comes_apart_as_it_was() -> None:
    parts = [part(6), part(6, seed=1), part(10)]
    apart = split_parts(join_parts(parts, ROWS), ROWS)
    for before, after, rows in zip(parts, apart, ROWS, strict=True):
        assert after.rank == 2
        assert torch.equal(after.down, before.down)
        assert torch.allclose(effect(after, rows), effect(before, rows), atol=1e-6)


@pytest.mark.parametrize("rank", [3, 4])
def test_any_other_adapter_shares_its_down(rank: int) -> None:
    whole = part(22, rank, 2.0)
    apart = split_parts(whole, ROWS)
    assert [p.rank for p in apart] == [rank] * 3
    assert torch.allclose(torch.cat([effect(p, r) for p, r in zip(apart, ROWS)]), effect(whole, 22), atol=1e-6)


def test_blocks_lie_on_the_diagonal() -> None:
    whole = block_diagonal([torch.ones(1, 2), None, torch.full((2, 1), 3.0)], [1, 1, 2])
    assert whole.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 3], [0, 0, 3]]
