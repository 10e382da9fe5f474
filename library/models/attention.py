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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mode: AttentionMode = AttentionMode.SDPA,
    keys: Sequence[int] | None = None,
) -> Tensor:
    """Multi-head attention: q [B, L, H*D], k and v [B, S, H*D] -> [B, L, H*D].

    `keys` [B] says how many keys, from the first, each row looks at; None is all. They are numbers of Python, so that
    nothing waits for the device, and short rows are computed by themselves: a mask would be written out as a matrix
    [B, H, L, S] and rule out the fast kernels.
    """
    if keys is not None:
        if min(keys) < max(keys):
            rows = [
                attention(q[i : i + 1], k[i : i + 1, :count], v[i : i + 1, :count], num_heads, mode)
                for i, count in enumerate(keys)
            ]
            return torch.cat(rows)
        k, v = k[:, : keys[0]], v[:, : keys[0]]
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


# Few enough that the scores of 4096 keys stay at 64 MiB a head and float32.
_QUERIES_AT_A_TIME = 1024


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v
