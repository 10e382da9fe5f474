"""The closest pair to a difference: exact where its rank suffices, best where it does not."""

from __future__ import annotations

import pytest
import torch

from networks.core.extraction import closest_pair, magnitude_quantile


def low_rank(rank: int, rows: int = 12, columns: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def test_a_difference_of_the_rank_is_met_exactly() -> None:
    pair = closest_pair(low_rank(3), 3)
    assert (pair.rank, pair.alpha, pair.scale) == (3, 3.0, 1.0)
    assert torch.allclose(pair.up @ pair.down, low_rank(3), atol=1e-5)


def test_the_error_of_a_lower_rank_is_what_is_left_of_the_singular_values() -> None:
    difference = low_rank(5)
    pair = closest_pair(difference, 2)
    left = torch.linalg.svdvals(difference)[2:].norm()
    assert torch.allclose((difference - pair.up @ pair.down).norm(), left, rtol=1e-4)


def test_the_rank_is_no_greater_than_a_side() -> None:
    assert closest_pair(low_rank(3), 100).rank == 9


def test_convolutions_keep_their_kernel() -> None:
    difference = low_rank(2, 8, 4 * 9).reshape(8, 4, 3, 3)
    pair = closest_pair(difference, 2)
    assert (pair.down.shape, pair.up.shape) == ((2, 4, 3, 3), (8, 2, 1, 1))
    assert torch.allclose(pair.difference(difference.shape), difference, atol=1e-5)


def test_clamping_does_not_depend_on_signs() -> None:
    difference = low_rank(4)
    pair, turned = closest_pair(difference, 4, 0.9), closest_pair(-difference, 4, 0.9)
    assert torch.allclose(pair.up.abs(), turned.up.abs(), atol=1e-5)
    bound = max(pair.up.abs().max(), pair.down.abs().max())
    free = closest_pair(difference, 4)
    every = torch.cat([free.up.flatten(), free.down.flatten()]).abs()
    assert float(bound) == pytest.approx(float(torch.quantile(every, 0.9)), rel=1e-5)


def test_quantiles_of_many_values_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact = [magnitude_quantile(values, quantile) for quantile in (0.1, 0.5, 0.99)]
    monkeypatch.setattr("networks.core.extraction.QUANTILE_SAMPLES", 10)
    assert [magnitude_quantile(values, quantile) for quantile in (0.1, 0.5, 0.99)] == pytest.approx(exact, rel=1e-5)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="infinite values or NaN"):
        closest_pair(torch.full((3, 3), float("nan")), 1)
