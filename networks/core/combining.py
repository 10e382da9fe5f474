"""Several LoRAs made into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.core.lora_file import LoraFile, LowRankPair


def combine(
    files: Sequence[LoraFile],
    ratios: Sequence[float],
    concat: bool,
    shuffle: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, LowRankPair]:
    """One set of adapters from several, computed in `dtype`; a layer that only some files cover is theirs alone.

    `concat` puts ranks beside each other: the effect is exactly the sum of the files' effects times their ratios.
    Without it the matrices are added, which keeps the rank: a file alone has its effect times its ratio, and several
    have products of one file's up with another's down as well. Alpha is that of the first file, in proportion to the
    rank. `shuffle` permutes the ranks of each layer, which changes no effect.

    Raises:
        ValueError: sizes of a layer differ between files; names both.
    """
    names = dict.fromkeys(name for file in files for name in file.pairs)
    combined = {}
    for name in names:
        held = [(file, ratio) for file, ratio in zip(files, ratios, strict=True) if name in file.pairs]
        _check_sizes(name, [file for file, _ in held], concat)
        pairs = [_cast(file.pairs[name], dtype, device) for file, _ in held]
        pair = _combined(pairs, [ratio for _, ratio in held], concat)
        combined[name] = pair if shuffle is None else _shuffled(pair, shuffle)
    return combined


def dimensions(pairs: Mapping[str, LowRankPair]) -> tuple[str, str]:
    """Rank and alpha of all adapters as metadata has them; `Dynamic` where they differ."""
    ranks = {str(pair.rank) for pair in pairs.values()}
    alphas = {str(float(pair.alpha)) for pair in pairs.values()}
    return ranks.pop() if len(ranks) == 1 else "Dynamic", alphas.pop() if len(alphas) == 1 else "Dynamic"


def _combined(pairs: Sequence[LowRankPair], ratios: Sequence[float], concat: bool) -> LowRankPair:
    base = pairs[0].scale
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for pair, ratio in zip(pairs, ratios, strict=True):
        strength = ratio * pair.scale / base
        # Half of it for each of the two, so that their sizes stay alike; the sign goes with down.
        root = math.sqrt(abs(strength))
        downs.append(pair.down * math.copysign(root, strength))
        ups.append(pair.up * root)
    down = torch.cat(downs) if concat else torch.stack(downs).sum(0)
    up = torch.cat(ups, dim=1) if concat else torch.stack(ups).sum(0)
    return LowRankPair(down, up, base * len(down))


def _shuffled(pair: LowRankPair, generator: torch.Generator) -> LowRankPair:
    order = torch.randperm(pair.rank, generator=generator).to(pair.down.device)
    return LowRankPair(pair.down[order], pair.up[:, order], pair.alpha)


def _cast(pair: LowRankPair, dtype: torch.dtype, device: torch.device | str) -> LowRankPair:
    return LowRankPair(pair.down.to(device, dtype), pair.up.to(device, dtype), pair.alpha)


def _check_sizes(name: str, files: Sequence[LoraFile], concat: bool) -> None:
    first = files[0].pairs[name]
    for file in files[1:]:
        pair = file.pairs[name]
        if pair.down.shape[1:] != first.down.shape[1:] or pair.up.shape[0] != first.up.shape[0]:
            raise ValueError(
                f"{name} is for a layer of {first.up.shape[0]} x {list(first.down.shape[1:])} in {files[0].path} and "
                f"of {pair.up.shape[0]} x {list(pair.down.shape[1:])} in {file.path}: they are for different models"
            )
        if not concat and pair.rank != first.rank:
            raise ValueError(
                f"{name} has rank {first.rank} in {files[0].path} and rank {pair.rank} in {file.path}: only LoRAs of "
                "one rank can be added; give --concat, which puts the ranks beside each other"
            )
