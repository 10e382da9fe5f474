"""How the cached encodings of one model family lie in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LatentFormat:
    """The latents of one family: `[channels, H / stride, W / stride]` for an image of `H x W` pixels."""

    channels: int
    stride: int
    suffix: str
    """End of the cache file's name, such as `_sd.npz`."""
    sizes_in_keys: bool = False
    """Several sizes share one file: every array's name ends in `_{h}x{w}`."""
    reads_stem_files: bool = False
    """An existing `<stem>.npz`, as older versions wrote it, is used in place of the sized name."""


@dataclass(frozen=True)
class TextFormat:
    """The text encodings of one family; `arrays` are the keys of `Condition.text`."""

    suffix: str
    """End of the cache file's name, such as `_te_outputs.npz`; empty when the family has no text cache."""
    arrays: tuple[str, ...]
    must_match: Mapping[str, object] = field(default_factory=dict)
    """Settings that are stored beside the arrays; another value in the file makes it stale."""
    mask: str = ""
    """The array of ones and then zeros that says how many tokens of a row count, if the denoiser must know."""
    token_groups: tuple[tuple[str, ...], ...] = ()
    """Arrays with one row for each token, those of one encoder together. Rows at the end that are zero in a whole
    group are not kept in the cache; in a batch, shorter ones are filled up with such rows."""
