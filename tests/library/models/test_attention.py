"""Every implementation of attention gives the same numbers."""

from __future__ import annotations

import sys

import pytest
import torch

from library.flags.run import AttentionFlags
from library.models import attention as module
from library.models.attention import AttentionMode, KeyCounts, attention, attention_mode


def test_all_modes_agree_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUERIES_AT_A_TIME", 4)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 10, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    expected = torch.empty(2, 10, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = torch.einsum("bld,bsd->bls", q[..., part], k[..., part]) / 2.0
        expected[..., part] = torch.einsum("bls,bsd->bld", scores.softmax(-1), v[..., part])
    for mode in (AttentionMode.PLAIN, AttentionMode.SDPA, AttentionMode.MEMORY_EFFICIENT):
        torch.testing.assert_close(attention(q, k, v, 3, mode), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (AttentionFlags(), AttentionMode.SDPA),
        (AttentionFlags(sdpa=True), AttentionMode.SDPA),
        (AttentionFlags(mem_eff_attn=True), AttentionMode.MEMORY_EFFICIENT),
    ],
)
def test_flags_choose_the_mode(flags: AttentionFlags, mode: AttentionMode) -> None:
    assert attention_mode(flags) is mode


def test_a_missing_xformers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match="--xformers needs .* pip install xformers"):
        attention_mode(AttentionFlags(xformers=True))


@pytest.mark.parametrize("mode", [AttentionMode.PLAIN, AttentionMode.SDPA, AttentionMode.MEMORY_EFFICIENT])
def test_rows_may_look_at_different_numbers_of_keys(mode: AttentionMode) -> None:
    q, k, v = (torch.randn(3, 5, 8) for _ in range(3))
    out = attention(q, k, v, 2, mode, KeyCounts((5, 2, 3)))
    for row, count in enumerate((5, 2, 3)):
        alone = attention(q[row : row + 1], k[row : row + 1, :count], v[row : row + 1, :count], 2, mode)
        torch.testing.assert_close(out[row : row + 1], alone)
    same = attention(q, k, v, 2, mode, KeyCounts((3, 3, 3)))
    torch.testing.assert_close(same, attention(q, k[:, :3], v[:, :3], 2, mode))
