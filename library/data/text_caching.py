"""Which captions must be encoded before training, and the way of each through encoder and writer."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.data.dataset import TrainingSet
from library.data.items import Encoding, ImageItem
from library.data.text_cache_files import (
    TextCache,
    empty_file,
    stale_variants,
    text_fingerprint,
    text_path,
    trimmed,
    write_text,
)
from library.data.text_variants import refusal, variant_captions
from library.files.atomic import remove_leftovers
from library.files.formats import TextFormat

logger = logging.getLogger(__name__)

EncodeText = Callable[[Sequence[str]], dict[str, Tensor]]
"""Captions -> the arrays of the family's text format, [B, ...] each."""

READERS = 4
"""Threads that look into cache files."""
BATCHES_IN_MEMORY = 8
"""Encodings that may be held before they are written, in batches; a long one takes megabytes."""


def cache_text(
    training_set: TrainingSet,
    encode: EncodeText,
    fmt: TextFormat,
    *,
    encoder_id: str,
    batch_size: int,
    to_disk: bool,
    variants: int = 1,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    skip_cache_check: bool = False,
) -> None:
    """Give every image of `training_set` the encoding of its caption, in memory or beside the image on disk.

    `variants` are encoded of captions that change (shuffled, tags dropped, wildcards), and the empty caption once
    for each folder, for captions that are dropped. On disk only what is missing or stale is encoded (with
    `skip_cache_check`, only what is missing), each file by one rank; the ranks must wait for each other before they
    train. In memory every rank encodes all. `encoder_id` names the encoders' weights and all that decides the
    encoding besides `fmt.must_match`; `dtype` is that of the numbers kept. Raises ValueError for settings that
    change captions in a way that cannot be cached, and for encodings that are not finite.
    """
    refuse_changing_captions(training_set, variants)
    targets = _targets(training_set, fmt, variants, to_disk)
    if to_disk:
        files = sorted({target.file for target in targets if target.file})
        mine = set(files[rank::world_size])
        if rank == 0:
            remove_leftovers({file.parent for file in files}, fmt.suffix)
        todo = _out_of_date([t for t in targets if t.file in mine], fmt, encoder_id, dtype, skip_cache_check)
    else:
        todo = targets
    _encode_all(todo, _Encoder(encode, fmt, encoder_id, batch_size, dtype))
    empty = next((target.encodings[0] for target in targets if not target.items and not to_disk), None)
    for dataset in training_set.with_held_out:
        dataset.text_cache = TextCache(fmt, empty)


@dataclass
class _Target:
    """A caption in its variants, wanted by one or more items; by none if it is the empty one."""

    texts: list[str]
    items: list[ImageItem]
    file: Path | None = None
    wanted: list[int] = field(default_factory=list)
    """Variants that must be encoded."""
    encodings: dict[int, Encoding] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """The texts to encode."""
        return [self.texts[variant] for variant in self.wanted]


@dataclass(frozen=True)
class _Encoder:
    """The text encoders, and how their answers are kept."""

    encode: EncodeText
    fmt: TextFormat
    encoder_id: str
    batch_size: int
    dtype: torch.dtype | None

    def answers(self, texts: Sequence[str]) -> dict[str, Encoding]:
        """The encoding of each of `texts`, short ones with short ones."""
        found: dict[str, Encoding] = {}
        ordered = sorted(set(texts), key=lambda text: (len(text), text))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            arrays = self.encode(batch)
            for row, text in enumerate(batch):
                encoding = trimmed({name: arrays[name][row] for name in self.fmt.arrays}, self.fmt, self.dtype)
                if not all(torch.isfinite(values).all() for values in encoding.arrays.values()):
                    raise ValueError(
                        f"the text encoders give values that are not numbers for {text[:80]!r}; "
                        "use --mixed_precision bf16 or no, and another --cache_dtype than float16"
                    )
                found[text] = encoding
        return found


def refuse_changing_captions(training_set: TrainingSet, variants: int) -> None:
    """Raise ValueError for settings that change captions in a way that `variants` of each cannot follow."""
    for dataset in training_set.with_held_out:
        for number, subset in enumerate(dataset.settings.subsets):
            captions = [item.caption for item in dataset.items if item.subset == number]
            reason = refusal(subset, captions, variants)
            if reason is not None:
                raise ValueError(f"{subset.source}: {reason}")


def _targets(training_set: TrainingSet, fmt: TextFormat, variants: int, to_disk: bool) -> list[_Target]:
    """What to encode, each caption of an image once; on disk every target has a file of its own."""
    targets: dict[tuple[Path, tuple[str, ...]], _Target] = {}
    for dataset in training_set.with_held_out:
        for item in dataset.items:
            texts = variant_captions(item, dataset.settings.subsets[item.subset].captions, variants)
            target = targets.setdefault((item.path, tuple(texts)), _Target(texts, []))
            target.items.append(item)
            item.text_variants = len(texts)
    found = list(targets.values())
    if to_disk:
        taken: Counter[Path] = Counter()
        for target in found:
            target.file = _free_file(target.items[0], fmt, taken)
            for item in target.items:
                item.text_file = target.file
        folders = sorted({item.path.parent for target in found for item in target.items})
        found += [_Target([""], [], empty_file(folder, fmt)) for folder in folders]
    else:
        found.append(_Target([""], []))
    for target in found:
        target.wanted = list(range(len(target.texts)))
    return found


def _free_file(item: ImageItem, fmt: TextFormat, taken: Counter[Path]) -> Path:
    """The usual cache file, or one of its own where a.png and a.jpg, or two datasets, would share it."""
    file = text_path(item, fmt)
    taken[file] += 1
    if taken[file] == 1:
        return file
    tag = hashlib.blake2b(repr((item.path.name, taken[file])).encode(), digest_size=4).hexdigest()
    return file.with_name(f"{item.path.stem}_{tag}{fmt.suffix}")


def _out_of_date(
    targets: list[_Target], fmt: TextFormat, encoder_id: str, dtype: torch.dtype | None, skip_cache_check: bool
) -> list[_Target]:
    """The targets with variants that no valid cache holds."""

    def stale(target: _Target) -> list[int]:
        assert target.file is not None
        if skip_cache_check:
            return [] if target.file.exists() else target.wanted
        prints = [text_fingerprint(text, encoder_id, fmt) for text in target.texts]
        return stale_variants(target.file, fmt, prints, dtype)

    with ThreadPoolExecutor(READERS) as pool:
        for target, wanted in zip(targets, pool.map(stale, targets), strict=True):
            target.wanted = wanted
    todo = [target for target in targets if target.wanted]
    logger.info("text: %d of %d captions are on disk", len(targets) - len(todo), len(targets))
    return todo


def _encode_all(targets: list[_Target], encoder: _Encoder) -> None:
    """Encode chunk by chunk, write behind: while one chunk is encoded, the one before it goes to disk."""
    done = 0
    with ThreadPoolExecutor(1) as writer:
        writes: list[Future[None]] = []
        for chunk in _chunks(targets, encoder.batch_size * BATCHES_IN_MEMORY):
            answers = encoder.answers([text for target in chunk for text in target.missing()])
            for write in writes:
                write.result()
            writes = [writer.submit(_keep, target, answers, encoder) for target in chunk]
            done += len(chunk)
            logger.info("text: %d of %d captions encoded", done, len(targets))
        for write in writes:
            write.result()


def _chunks(targets: list[_Target], limit: int) -> Iterator[list[_Target]]:
    """Targets whose captions are about equally long, with about `limit` different texts at a time."""
    chunk: list[_Target] = []
    texts: set[str] = set()
    for target in sorted(targets, key=lambda target: (max(map(len, target.texts)), target.texts)):
        missing = set(target.missing())
        if chunk and len(texts | missing) > limit:
            yield chunk
            chunk, texts = [], set()
        chunk.append(target)
        texts |= missing
    if chunk:
        yield chunk


def _keep(target: _Target, answers: dict[str, Encoding], encoder: _Encoder) -> None:
    """Put the encodings where they are wanted: into the file, or into the items."""
    found = {variant: answers[target.texts[variant]] for variant in target.wanted}
    if target.file is None:
        target.encodings = found
        for item in target.items:
            item.text = list(found.values())
        return
    marked = {
        variant: (text_fingerprint(target.texts[variant], encoder.encoder_id, encoder.fmt), encoding)
        for variant, encoding in found.items()
    }
    write_text(target.file, encoder.fmt, marked, kept=set(range(len(target.texts))) - found.keys())
