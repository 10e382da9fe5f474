"""Merging adds `factor * up @ down`, whatever the kind of layer."""

from __future__ import annotations

import pytest
import torch

from networks.core.merge import low_rank_difference, low_rank_norm, merge_into


@pytest.mark.parametrize(
    ("weight", "down", "up"),
    [
        ((5, 6), (2, 6), (5, 2)),
        ((5, 6, 1, 1), (2, 6, 1, 1), (5, 2, 1, 1)),
        ((5, 6), (2, 6, 1, 1), (5, 2, 1, 1)),
        ((5, 6, 3, 3), (2, 6, 3, 3), (5, 2, 1, 1)),
    ],
)
def test_the_difference_is_what_the_two_layers_do_one_after_the_other(weight, down, up) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(down), torch.randn(up)
    expected = 0.5 * torch.einsum("or,rc->oc", b.flatten(1), a.flatten(1)).reshape(weight)
    assert torch.allclose(low_rank_difference(a, b, 0.5, torch.Size(weight)), expected, atol=1e-6)
    assert low_rank_norm(a, b).item() == pytest.approx(2 * expected.norm().item(), rel=1e-5)


def test_half_precision_weights_are_merged_in_full_precision() -> None:
    weight = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    down, up = torch.full((2, 4), 0.001, dtype=torch.float16), torch.full((4, 2), 1.0, dtype=torch.float16)
    merge_into(weight, lambda base: low_rank_difference(down, up, 3.0, base.shape))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, torch.full((4, 4), 1.0 + 0.006).bfloat16())


def test_another_dtype_may_be_asked_for() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    merge_into(weight, lambda base: torch.ones_like(base), dtype=torch.float16, device="cpu")
    assert weight.dtype == torch.float16
    assert torch.equal(weight.float(), torch.ones(4, 4))
