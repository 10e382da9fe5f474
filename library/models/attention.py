"""One attention over the implementations there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from library.flags.run import AttentionFlags


class AttentionMode(Enum):
    """Which implementation computes softmax(q k^T / sqrt(D)) v; all give the same numbers up to rounding."""

    PLAIN = "plain"
    """Two matrix products and a softmax: the whole [L, S] matrix at once."""
    SDPA = "sdpa"
    """PyTorch's scaled_dot_product_attention."""
    XFORMERS = "xformers"
    """xformers' memory_efficient_attention."""
    MEMORY_EFFICIENT = "mem_eff"
    """Plain PyTorch, a few queries at a time."""


def attention_mode(flags: AttentionFlags) -> AttentionMode:
    """The mode that --mem_eff_attn, --xformers or --sdpa ask for; sdpa when none is given.

    Raises:
        ValueError: --xformers is given and xformers is not installed.
    """
    if flags.mem_eff_attn:
        return AttentionMode.MEMORY_EFFICIENT
    if not flags.xformers:
        return AttentionMode.SDPA
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ValueError("--xformers needs the package xformers: pip install xformers (or use --sdpa)") from error
    return AttentionMode.XFORMERS


class KeyCounts:
    """How many keys, from the first, the queries of each row of a batch look at.

    An object rather than a tuple, since a compiler would make one program for every tuple that it meets.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mode: AttentionMode = AttentionMode.SDPA,
    keys: KeyCounts | None = None,
) -> Tensor:
    """Multi-head attention: q [B, L, H*D], k and v [B, S, H*D] -> [B, L, H*D].

    With `keys` each row looks at so many; None is all of them. Rows with different numbers are computed by
    themselves: a mask would be written out as a matrix [B, H, L, S] and rule out the fast kernels.
    """
    if keys is None:
        return _attention(q, k, v, num_heads, mode)
    return _by_row(q, k, v, num_heads, mode, keys)


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mode: AttentionMode) -> Tensor:
    if mode is AttentionMode.XFORMERS:
        import xformers.ops

        q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
        out: Tensor = xformers.ops.memory_efficient_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return out.flatten(2)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    if mode is AttentionMode.SDPA:
        out = F.scaled_dot_product_attention(q, k, v)
    elif mode is AttentionMode.PLAIN:
        out = _softmax_attention(q, k, v)
    else:
        out = torch.cat([_softmax_attention(rows, k, v) for rows in q.split(_QUERIES_AT_A_TIME, dim=2)], dim=2)
    return out.transpose(1, 2).flatten(2)


# Between two compiled pieces, so that no program depends on the counts.
@torch.compiler.disable
def _by_row(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mode: AttentionMode, keys: KeyCounts) -> Tensor:
    counts = keys.counts
    if min(counts) == max(counts):
        return _attention(q, k[:, : counts[0]], v[:, : counts[0]], num_heads, mode)
    rows = [
        _attention(q[i : i + 1], k[i : i + 1, :count], v[i : i + 1, :count], num_heads, mode)
        for i, count in enumerate(counts)
    ]
    return torch.cat(rows)


# Few enough that the scores of 4096 keys stay at 64 MiB a head and float32.
_QUERIES_AT_A_TIME = 1024


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v
