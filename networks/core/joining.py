"""Layers that are one in one program and several in another: their adapters joined, and taken apart again.

FLUX computes q, k and v (and in some blocks the first layer of the MLP) by one matrix whose rows are theirs; diffusers
has a layer for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.core.lora_file import LowRankPair


def join_parts(parts: Sequence[LowRankPair | None], rows: Sequence[int]) -> LowRankPair:
    """One adapter with the effect of several on top of each other; None has no effect on its `rows`.

    Where all parts share one `down`, the result has their rank. Otherwise `down` is all of theirs below each other,
    `up` is block-diagonal, and the rank is the sum. alpha is the rank: what else a part is scaled with goes into
    `up`, so that any program that reads alpha / rank gets the full effect.
    """
    present = [part for part in parts if part is not None]
    first = present[0].down
    assert all(part is None or part.up.shape[0] == count for part, count in zip(parts, rows, strict=True))
    if len(present) == len(parts) and all(torch.equal(first, part.down) for part in present[1:]):
        up = torch.cat([_scaled_up(part) for part in present])
        return LowRankPair(first, up, float(len(first)))
    return LowRankPair(
        torch.cat([part.down for part in present]),
        block_diagonal([None if part is None else _scaled_up(part) for part in parts], rows),
        float(sum(part.rank for part in present)),
    )


def split_parts(pair: LowRankPair, rows: Sequence[int]) -> list[LowRankPair]:
    """The parts of a joined adapter, which together have its effect, each with alpha for its own rank.

    An adapter that was joined from as many parts of equal rank gives just those; of any other, each part gets the
    whole `down` and its rows of `up`.
    """
    blocks = torch.split(pair.up, list(rows))
    if pair.rank % len(rows) == 0:
        rank = pair.rank // len(rows)
        places = [slice(i * rank, (i + 1) * rank) for i in range(len(rows))]
        if torch.equal(pair.up, block_diagonal([up[:, p] for up, p in zip(blocks, places)], rows)):
            return [
                LowRankPair(pair.down[place], up[:, place], pair.scale * rank)
                for up, place in zip(blocks, places, strict=True)
            ]
    return [LowRankPair(pair.down, up, pair.alpha) for up in blocks]


def block_diagonal(ups: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """`ups` [O_i, r_i] along the diagonal of [sum O, sum r]; None is a block of `rows` without columns."""
    present = [up for up in ups if up is not None]
    whole = present[0].new_zeros(sum(rows), sum(up.shape[1] for up in present))
    row = column = 0
    for up, count in zip(ups, rows, strict=True):
        if up is not None:
            whole[row : row + count, column : column + up.shape[1]] = up
            column += up.shape[1]
        row += count
    return whole


def _scaled_up(part: LowRankPair) -> Tensor:
    """`up` such that alpha equals the rank."""
    return part.up if part.alpha == part.rank else part.up * part.scale
