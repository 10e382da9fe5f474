"""Which images must be encoded before training, and the way of each through reader, encoder and writer."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import crop_condition
from library.data.cache_files import (
    ImageState,
    Recipe,
    Verdict,
    array_suffix,
    check_latents,
    file_in_use,
    image_state,
    latents_path,
    mark_latents,
    write_latents,
)
from library.data.dataset import TrainingSet
from library.data.items import CachedLatents, ImageItem
from library.data.pixels import alpha_of, make_picture, to_pixels
from library.files.atomic import remove_leftovers
from library.files.formats import LatentFormat

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, Sequence[int]], Tensor]
"""Pixels [B, 3, H, W] float32 in [-1, 1] and one seed for each row -> latents [B, C, h, w]."""

READERS = 4
"""Threads that read and scale images."""
AHEAD = 16
"""Pictures that may wait for the encoder, beyond the batch in the making."""
WRITES = 64
"""Results that may wait for the disk."""
SECONDS_BETWEEN_REPORTS = 10


def cache_latents(
    training_set: TrainingSet,
    encode: Encode,
    fmt: LatentFormat,
    *,
    vae_id: str,
    batch_size: int,
    to_disk: bool,
    rank: int = 0,
    world_size: int = 1,
    skip_cache_check: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Give every image of `training_set` its latents, in memory or beside the image on disk.

    On disk only what is missing or stale is encoded (with `skip_cache_check`, only what is missing), each file by
    one rank; the ranks must wait for each other before they train. In memory every rank encodes all images, since
    any image may come up on any rank. `vae_id` names the VAE's weights; other weights make a file stale. Seeds
    come from the image's bytes and settings, so equal inputs give equal caches. `dtype` is that of the numbers kept;
    unless given, float32 on disk and the VAE's in memory. Raises ValueError for images that
    cannot be read, for latents that are not finite, and for settings that change pictures each time.
    """
    refuse_changing_pictures(training_set)
    targets = _targets(training_set, fmt, vae_id, to_disk)
    if to_disk:
        files = sorted({target.file for target in targets if target.file})
        mine = set(files[rank::world_size])
        if rank == 0:
            remove_leftovers({file.parent for file in files}, fmt.suffix)
        todo = _out_of_date([target for target in targets if target.file in mine], fmt, skip_cache_check, dtype)
    else:
        todo = targets
    if todo:
        kept_in = dtype or (torch.float32 if to_disk else None)
        _encode_all(todo, encode, fmt, batch_size, kept_in)
    for dataset in training_set.with_held_out:
        dataset.latent_format = fmt


@dataclass
class _Target:
    """One picture whose latents are wanted, by one or more items."""

    recipe: Recipe
    items: list[ImageItem]
    flips: bool
    file: Path | None = None

    @property
    def item(self) -> ImageItem:
        return self.items[0]


@dataclass
class _Picture:
    """A picture on its way to the encoder."""

    target: _Target
    image: np.ndarray
    state: ImageState


@dataclass
class _Done:
    """What was learnt on the way."""

    count: int = 0
    total: int = 0
    unreadable: list[str] = field(default_factory=list)
    reported: float = field(default_factory=time.monotonic)


def refuse_changing_pictures(training_set: TrainingSet) -> None:
    """Raise ValueError when pictures are to change from step to step, which cached latents cannot."""
    for dataset in training_set.with_held_out:
        for subset in dataset.settings.subsets:
            for key in ("random_crop", "color_aug", "face_crop_aug_range"):
                if getattr(subset, key):
                    raise ValueError(f"{subset.source}: {key} cannot be used with --cache_latents; turn one off")


def _targets(training_set: TrainingSet, fmt: LatentFormat, vae_id: str, to_disk: bool) -> list[_Target]:
    """What to encode, each picture once; on disk every target has a place of its own."""
    targets: dict[tuple[Path, Recipe], _Target] = {}
    for dataset in training_set.with_held_out:
        for item in dataset.items:
            subset = dataset.settings.subsets[item.subset]
            recipe = Recipe(item.bucket, item.resized, subset.resize_interpolation, vae_id, subset.alpha_mask)
            target = targets.setdefault((item.path, recipe), _Target(recipe, [], False))
            target.items.append(item)
            target.flips |= subset.flip_aug
    if to_disk:
        taken: set[tuple[Path, str]] = set()
        for target in targets.values():
            target.file = _free_file(target, fmt, taken)
            for item in target.items:
                item.latents_file = target.file
    return list(targets.values())


def _free_file(target: _Target, fmt: LatentFormat, taken: set[tuple[Path, str]]) -> Path:
    """The usual cache file, or one of its own where a.png and a.jpg, or two resolutions, would share it."""
    file, end = latents_path(target.item, fmt), array_suffix(target.item, fmt)
    if (file, end) in taken:
        recipe = target.recipe
        origin = repr((target.item.path.name, recipe.bucket, recipe.resized, recipe.interpolation, recipe.alpha))
        tag = hashlib.blake2b(origin.encode(), digest_size=4).hexdigest()
        file = file.with_name(f"{file.name.removesuffix(fmt.suffix)}_{tag}{fmt.suffix}")
    taken.add((file, end))
    return file


def _out_of_date(
    targets: list[_Target], fmt: LatentFormat, skip_cache_check: bool, dtype: torch.dtype | None
) -> list[_Target]:
    """The targets without a valid cache file; files that fit but say nothing of their origin are marked."""

    def verdict(target: _Target) -> Verdict:
        assert target.file is not None
        if skip_cache_check:
            exists = file_in_use(target.file, target.item, fmt).exists()
            return Verdict.GOOD if exists else Verdict.STALE
        return check_latents(target.file, target.item, fmt, target.recipe, target.flips, dtype)

    with ThreadPoolExecutor(READERS) as pool:
        verdicts = list(pool.map(verdict, targets))
    counts = Counter(verdicts)
    for target, found in zip(targets, verdicts, strict=True):
        if found in (Verdict.TOUCHED, Verdict.UNMARKED):
            assert target.file is not None
            mark_latents(target.file, target.item, fmt, target.recipe)
    if counts[Verdict.UNMARKED]:
        logger.warning(
            "%d latent caches do not say what image and VAE they were made from and are taken as they are; "
            "delete them if either has changed. From now on a change is noticed.",
            counts[Verdict.UNMARKED],
        )
    logger.info("latents: %d of %d are on disk", len(targets) - counts[Verdict.STALE], len(targets))
    return [target for target, found in zip(targets, verdicts, strict=True) if found is Verdict.STALE]


def _encode_all(
    targets: list[_Target], encode: Encode, fmt: LatentFormat, batch_size: int, dtype: torch.dtype | None
) -> None:
    """Read ahead, encode batch by batch, write behind."""
    done = _Done(total=len(targets))
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as writer:
        writes: deque[Future[None]] = deque()
        for batch in _batches(targets, readers, batch_size, done):
            latents, flipped = _encode_batch(batch, encode, dtype)
            for row, picture in enumerate(batch):
                mirrored = None if flipped is None else flipped[row]
                writes.append(writer.submit(_keep, picture, fmt, latents[row], mirrored))
            while len(writes) > WRITES:
                writes.popleft().result()
            _report(done, len(batch))
        for write in writes:
            write.result()
    if done.unreadable:
        listed = "\n".join(done.unreadable)
        raise ValueError(f"{len(done.unreadable)} image(s) cannot be read; repair or remove them:\n{listed}")


def _batches(
    targets: list[_Target], readers: ThreadPoolExecutor, batch_size: int, done: _Done
) -> Iterator[list[_Picture]]:
    """Pictures of equal size and flips, `batch_size` at a time; unreadable ones are noted and left out."""
    ordered = sorted(targets, key=lambda target: (target.recipe.bucket, target.flips))
    batch: list[_Picture] = []
    for picture in _read_ahead(ordered, readers, batch_size + AHEAD):
        if isinstance(picture, str):
            done.unreadable.append(picture)
            continue
        if batch and (len(batch) == batch_size or _kind(batch[0]) != _kind(picture)):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _kind(picture: _Picture) -> tuple[tuple[int, int], bool]:
    return picture.target.recipe.bucket, picture.target.flips


def _read_ahead(targets: Iterable[_Target], readers: ThreadPoolExecutor, ahead: int) -> Iterator[_Picture | str]:
    pending: deque[Future[_Picture | str]] = deque()
    for target in targets:
        pending.append(readers.submit(_read, target))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read(target: _Target) -> _Picture | str:
    """The picture of `target`, or the line that says why there is none."""
    item, recipe = target.item, target.recipe
    try:
        content = item.path.read_bytes()
        image = make_picture(content, recipe.resized, recipe.bucket, recipe.interpolation, alpha=recipe.alpha)
        return _Picture(target, image, image_state(item.path, content))
    except (ValueError, OSError) as error:
        return f"  {item.path}: {error}"


def _encode_batch(batch: list[_Picture], encode: Encode, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Latents [B, C, h, w] on the CPU, and those of the mirror images if they are wanted."""
    pixels = to_pixels([picture.image[:, :, :3] for picture in batch])
    prints = [picture.target.recipe.fingerprint(picture.state.digest) for picture in batch]
    latents = _checked(encode(pixels, [_seed(name) for name in prints]), batch, dtype)
    if not batch[0].target.flips:
        return latents, None
    return latents, _checked(encode(pixels.flip(-1), [_seed(name + " flipped") for name in prints]), batch, dtype)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _checked(latents: Tensor, batch: list[_Picture], dtype: torch.dtype | None) -> Tensor:
    latents = latents.detach().to("cpu", dtype or latents.dtype)
    if not torch.isfinite(latents).all():
        bad = [str(picture.target.item.path) for picture, row in zip(batch, latents) if not torch.isfinite(row).all()]
        raise ValueError(
            f"the VAE gives values that are not numbers for {', '.join(bad)}; use --no_half_vae, another --vae, "
            "or another --cache_dtype than float16"
        )
    return latents


def _keep(picture: _Picture, fmt: LatentFormat, latents: Tensor, flipped: Tensor | None) -> None:
    """Put the latents where they are wanted: into the file, or into the items."""
    target, item = picture.target, picture.target.item
    mask = alpha_of(picture.image) if target.recipe.alpha else None
    if target.file is not None:
        write_latents(target.file, item, fmt, target.recipe, picture.state, latents, flipped, mask)
        return
    # Copies, since a row of a batch would hold on to the whole batch.
    mirrored = None if flipped is None else flipped.clone()
    cached = CachedLatents(latents.clone(), item.size, crop_condition(item.size, item.bucket), mirrored, mask)
    for wanting in target.items:
        wanting.latents = cached


def _report(done: _Done, count: int) -> None:
    done.count += count
    now = time.monotonic()
    if done.count == done.total or now - done.reported > SECONDS_BETWEEN_REPORTS:
        done.reported = now
        logger.info("latents: %d of %d encoded", done.count, done.total)
