"""Which images are the same, byte for byte or to the eye."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.pixels import glance

GRID = (9, 8)
"""Columns and rows of the squeezed image whose neighbours are compared: 64 differences."""
BITS_APART = 4
"""Equal to the eye are images of which at most so many of the 64 signs differ ..."""
LEVELS_APART = 6.0
"""... and whose squeezed colours differ by no more than this on average, of 255; flat images have no signs."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Look:
    """What one image file is, seen from afar."""

    digest: str
    """Of the file's bytes."""
    kind: str
    """The format it is in, such as JPEG."""
    signs: np.uint64
    """64 bits: whether each cell of the grid is brighter than its right neighbour (the "difference hash")."""
    colours: np.ndarray
    """[8, 9, 3] uint8"""


def look_at_all(paths: Sequence[Path]) -> dict[Path, Look | str]:
    """The look of every image, or the reason why it cannot be read; every file is decoded once."""

    def look(path: Path) -> Look | str:
        try:
            return look_at(path)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def look_at(path: Path) -> Look:
    """The look of one image; ValueError says why it cannot be read."""
    content = path.read_bytes()
    kind, colours = glance(content, GRID)
    bright = colours.astype(np.uint16).sum(axis=2)
    signs = np.packbits(bright[:, :-1] > bright[:, 1:]).view(np.uint64)[0]
    return Look(hashlib.blake2b(content, digest_size=16).hexdigest(), kind, signs, colours)


def equal_files(looks: Mapping[Path, Look]) -> list[list[Path]]:
    """Groups of files with the same bytes, each in the order given."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, look in looks.items():
        groups[look.digest].append(path)
    return [group for group in groups.values() if len(group) > 1]


def alike_images(looks: Mapping[Path, Look]) -> list[list[Path]]:
    """Groups of images that look the same although their bytes differ: of equal files only the first is compared."""
    firsts: dict[str, Path] = {}
    for path, look in looks.items():
        firsts.setdefault(look.digest, path)
    paths = list(firsts.values())
    group_of = list(range(len(paths)))
    for one, two in _alike_pairs([looks[path] for path in paths]):
        _join(group_of, one, two)
    groups: dict[int, list[Path]] = defaultdict(list)
    for index, path in enumerate(paths):
        groups[_head(group_of, index)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _alike_pairs(looks: list[Look]) -> Iterable[tuple[int, int]]:
    """Pairs of places, the smaller first; all signs are compared with all, some rows at a time."""
    signs = np.array([look.signs for look in looks], dtype=np.uint64)
    for start in range(0, len(looks), ROWS_AT_ONCE):
        rows = signs[start : start + ROWS_AT_ONCE]
        near = np.bitwise_count(rows[:, None] ^ signs[None, start:]) <= BITS_APART
        for row, column in np.argwhere(np.triu(near, 1)):
            one, two = looks[start + row].colours, looks[start + column].colours
            if np.abs(one.astype(np.int16) - two).mean() <= LEVELS_APART:
                yield int(start + row), int(start + column)


def _head(group_of: list[int], index: int) -> int:
    while group_of[index] != index:
        group_of[index] = group_of[group_of[index]]
        index = group_of[index]
    return index


def _join(group_of: list[int], one: int, two: int) -> None:
    heads = sorted((_head(group_of, one), _head(group_of, two)))
    group_of[heads[1]] = heads[0]
