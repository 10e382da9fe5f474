"""How the encoding of a caption lies in memory and on disk: trimmed, in variants, with a fingerprint of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from library.data.cache_arrays import MARK, NUMBERS, UNREADABLE, fine_enough, name_of, rewrite, to_array, to_tensor
from library.data.items import Encoding, ImageItem
from library.files.formats import TextFormat

VERSION = 1
"""Counts up when the same text, settings and encoder give another encoding."""

EMPTY = ".empty_caption"
"""The empty caption of a folder has a file of its own; no image beside it bears this name."""


@dataclass(frozen=True)
class TextCache:
    """Where the encodings of one dataset's captions are, once all of them are cached."""

    fmt: TextFormat
    empty: Encoding | None = None
    """The empty caption, when encodings are cached in memory."""

    def text(self, item: ImageItem, variant: int | None) -> dict[str, Tensor]:
        """The encoding of a variant of the item's caption, or with None of the empty caption."""
        if item.text_file is None:
            found = self.empty if variant is None else item.text[variant]
            assert found is not None
        else:
            file = item.text_file if variant is not None else empty_file(item.path.parent, self.fmt)
            found = read_text(file, self.fmt, variant or 0)
        return whole(found, self.fmt)


def text_path(item: ImageItem, fmt: TextFormat) -> Path:
    """`<image without extension><suffix>`"""
    return item.path.with_name(f"{item.path.stem}{fmt.suffix}")


def empty_file(folder: Path, fmt: TextFormat) -> Path:
    """Where the empty caption of the images in `folder` is kept."""
    return folder / f"{EMPTY}{fmt.suffix}"


def text_fingerprint(text: str, encoder_id: str, fmt: TextFormat) -> str:
    """A name for what the encoders make of `text` under the settings of `fmt`."""
    settings = sorted((name, repr(value)) for name, value in fmt.must_match.items())
    return hashlib.blake2b(repr((VERSION, text, encoder_id, settings)).encode(), digest_size=16).hexdigest()


def trimmed(arrays: Mapping[str, Tensor], fmt: TextFormat, dtype: torch.dtype | None) -> Encoding:
    """One row of a batch without the zeros at the end, on the CPU; `dtype` is that of its floating numbers.

    Without a `dtype` numbers stay as they are, except that bf16 becomes float32, which every reader knows.
    """
    kept = {name: _cast(values.detach().to("cpu"), dtype) for name, values in arrays.items()}
    lengths = []
    for group in fmt.token_groups:
        length = len(kept[group[0]])
        used = torch.zeros(length, dtype=torch.bool)
        for name in group:
            used |= (kept[name].reshape(length, -1) != 0).any(dim=1)
        rows = max(int(used.nonzero().max()) + 1 if used.any() else 0, 1)
        kept |= {name: kept[name][:rows] for name in group}
        lengths.append(length)
    # Copies, since a part of a batch would hold on to the whole batch.
    return Encoding({name: values.clone() for name, values in kept.items()}, tuple(lengths))


def whole(encoding: Encoding, fmt: TextFormat) -> dict[str, Tensor]:
    """The arrays of `encoding` with the rows of zeros that it came with."""
    found = dict(encoding.arrays)
    for group, length in zip(fmt.token_groups, encoding.lengths, strict=False):
        found |= {name: _filled_up(found[name], length) for name in group}
    return found


def stack_text(rows: Sequence[Mapping[str, Tensor]], fmt: TextFormat) -> dict[str, Tensor]:
    """The encodings of a batch, [B, ...] each; shorter ones get rows of zeros at the end."""
    by_token = {name for group in fmt.token_groups for name in group}
    stacked = {}
    for name in fmt.arrays:
        values = [row[name] for row in rows]
        if name in by_token:
            longest = max(len(value) for value in values)
            values = [_filled_up(value, longest) for value in values]
        stacked[name] = torch.stack(values)
    return stacked


def stale_variants(
    file: Path, fmt: TextFormat, fingerprints: Sequence[str], dtype: torch.dtype | None = None
) -> list[int]:
    """Which variants, by their numbers, the cache `file` does not hold, or holds of another text or encoder."""
    if not file.exists():
        return list(range(len(fingerprints)))
    try:
        with np.load(file, allow_pickle=False) as arrays:
            present = set(arrays.files)
            marks = {
                number: str(arrays[MARK + _end(number)]).split()
                for number in range(len(fingerprints))
                if {name + _end(number) for name in (*fmt.arrays, MARK)} <= present
            }
    except UNREADABLE:
        return list(range(len(fingerprints)))
    return [
        number
        for number, wanted in enumerate(fingerprints)
        if number not in marks or marks[number][0] != wanted or not fine_enough(marks[number][1], dtype)
    ]


def write_text(
    file: Path, fmt: TextFormat, encodings: Mapping[int, tuple[str, Encoding]], kept: Collection[int] = ()
) -> None:
    """Write variants, each with its fingerprint; of what the file holds, the variants `kept` stay."""
    arrays = {
        name: np.array(value if isinstance(value, bool | int | float | str) else repr(value))
        for name, value in fmt.must_match.items()
    }
    for number, (fingerprint, encoding) in encodings.items():
        numbers = _floating_type(encoding)
        arrays |= {name + _end(number): to_array(encoding.arrays[name]) for name in fmt.arrays}
        arrays[MARK + _end(number)] = np.array(" ".join([fingerprint, numbers, *map(str, encoding.lengths)]))
        if numbers == "bfloat16":
            arrays[NUMBERS + _end(number)] = np.array(numbers)
    staying = {name + _end(number) for number in kept for name in (*fmt.arrays, MARK, NUMBERS)}
    rewrite(file, arrays, keeps=staying.__contains__)


def read_text(file: Path, fmt: TextFormat, variant: int = 0) -> Encoding:
    """One variant of a cache file; ValueError names a broken file."""
    end = _end(variant)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: to_tensor(arrays[name + end]) for name in fmt.arrays}
            words = str(arrays[MARK + end]).split() if MARK + end in arrays.files else []
    except UNREADABLE as error:
        raise ValueError(f"{file}: not a usable cache of text ({error}); delete it and start again") from error
    return Encoding(found, tuple(int(length) for length in words[2:]))


def _end(variant: int) -> str:
    """What the names of a variant's arrays end in; the first one bears the names that other programs know."""
    return f"_v{variant}" if variant else ""


def _cast(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not values.is_floating_point():
        return values
    if dtype is None:
        return values.float() if values.dtype == torch.bfloat16 else values
    return values.to(dtype)


def _filled_up(values: Tensor, length: int) -> Tensor:
    return pad(values, [0, 0] * (values.dim() - 1) + [0, length - len(values)]) if len(values) < length else values


def _floating_type(encoding: Encoding) -> str:
    return next((name_of(value.dtype) for value in encoding.arrays.values() if value.is_floating_point()), "float32")
