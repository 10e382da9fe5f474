"""What may be wrong with a dataset: one function for each kind of mistake."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from library.data.cache_arrays import UNREADABLE
from library.data.captions import render_caption
from library.data.config import SubsetSettings
from library.data.duplicates import alike_images, equal_files
from library.data.findings import missing_caption
from library.data.image_set import Bucket, ImageSet
from library.data.items import ImageItem
from library.data.report import Collection, Finding, Remark, Severity, counted, effective_batch_size

MOST_ENLARGED = 1.5
"""An image scaled up more than this looks soft, and softness is learnt."""
MOST_CROPPED = 0.2
"""A part of the picture, cut off, that may well hold the subject."""
ENDINGS = {"JPEG": {".jpg", ".jpeg"}, "MPO": {".jpg", ".jpeg"}, "JXL": {".jxl"}, "DIB": {".bmp"}}
"""Format by content -> endings; a format that does not stand here is called as its ending."""
DRAWS = 8
"""So often a caption with wildcards is tried."""

Check = Callable[[Collection], "Finding | None"]


def all_findings(seen: Collection) -> list[Finding]:
    """Everything that is wrong, the worst first."""
    order = list(Severity)
    found = [finding for check in CHECKS if (finding := check(seen))]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def no_images(seen: Collection) -> Finding | None:
    """Nothing to train on."""
    if any(not item.is_reg for dataset in seen.datasets for item in dataset.items):
        return None
    remarks = [Remark(str(subset.source)) for _, subset in _subsets(seen)] or [Remark("no folder")]
    return _finding("no_images", Severity.STOPS, "no training images were found", remarks, "correct the folders")


def empty_folders(seen: Collection) -> Finding | None:
    """Folders that are not there, or without images."""
    used = {(id(dataset), item.subset) for dataset in seen.datasets for item in dataset.items}
    remarks = []
    for dataset in seen.datasets:
        for number, subset in enumerate(dataset.settings.subsets):
            if subset.image_dir is not None and not subset.image_dir.is_dir():
                remarks.append(Remark(str(subset.source), "there is no such folder"))
            elif (id(dataset), number) not in used:
                remarks.append(Remark(str(subset.source), "no image of it is used"))
    title = f"{_count(remarks, 'folder')} without images"
    return _finding("empty_folder", Severity.HURTS, title, remarks, "correct image_dir, or take the folder out")


def corrupt(seen: Collection) -> Finding | None:
    """Files that are not, or not wholly, an image."""
    remarks = [Remark(str(path), reason) for path, reason in seen.findings.corrupt.items()]
    skip = seen.asked.skip_corrupt
    severity = Severity.HURTS if skip else Severity.STOPS
    title = f"{_count(remarks, 'image')} cannot be read" + (" and are left out" if skip else "")
    return _finding("corrupt", severity, title, remarks, "repair or remove them, or train with --skip_corrupt")


def misfits(seen: Collection) -> Finding | None:
    """Images for which there is no bucket."""
    remarks = [Remark(str(path), reason) for path, reason in seen.misfits.items()]
    cure = "remove them, or train without bucket_no_upscale"
    return _finding("no_bucket", Severity.STOPS, f"{_count(remarks, 'image')} in no bucket", remarks, cure)


def bad_captions(seen: Collection) -> Finding | None:
    """Caption files that hold nothing, or no text."""
    remarks = [Remark(str(path), reason) for path, reason in seen.findings.bad_captions.items()]
    title = f"{_count(remarks, 'caption file')} cannot be used"
    return _finding("bad_caption", Severity.STOPS, title, remarks, "save them as UTF-8 text with a caption in it")


def bad_metadata(seen: Collection) -> Finding | None:
    """Entries of metadata files that cannot be used."""
    remarks = [Remark(name, reason) for name, reason in seen.findings.bad_metadata.items()]
    title = f"{_count(remarks, 'entry', 'entries')} of metadata files cannot be used"
    return _finding("bad_metadata", Severity.STOPS, title, remarks, "correct or remove them")


def unpaired(seen: Collection) -> Finding | None:
    """Images without a mask or conditioning image that fits, and the other way round."""
    remarks = [Remark(str(path), reason) for path, reason in seen.findings.unpaired.items()]
    title = f"{_count(remarks, 'image')} without a mask or conditioning image that fits"
    cure = "give both files the same name but for the ending, and remove what has no partner"
    return _finding("unpaired", Severity.STOPS, title, remarks, cure)


def missing_captions(seen: Collection) -> Finding | None:
    """Images without caption file and class tokens."""
    remarks = [
        Remark(str(path), missing_caption(path, subset))
        for path, subset in seen.findings.uncaptioned.items()
        if path not in seen.findings.corrupt
    ]
    severity = Severity.NOTE if seen.asked.allow_uncaptioned else Severity.STOPS
    cure = "write caption files (--caption_extension names their ending), set class_tokens, or use --allow_uncaptioned"
    return _finding("missing_caption", severity, f"{_count(remarks, 'image')} without a caption", remarks, cure)


def blank_captions(seen: Collection) -> Finding | None:
    """Captions of blanks or a line break, which count as empty."""
    silent = set(seen.findings.uncaptioned) | set(seen.findings.bad_captions)
    remarks = [
        Remark(str(item.path))
        for item in _items(seen)
        if not item.caption.strip() and item.path not in silent and not _has_bad_file(seen, item)
    ]
    cure = "write captions, unless these images are meant to be learnt without words"
    return _finding("blank_caption", Severity.NOTE, f"{_count(remarks, 'caption')} with nothing in it", remarks, cure)


def long_captions(seen: Collection) -> Finding | None:
    """Captions whose end the text encoder never sees."""
    count, limit = seen.asked.count_tokens or estimated_tokens, seen.asked.max_tokens
    about = "" if seen.asked.count_tokens else "about "
    remarks = []
    for dataset, item in _with_datasets(seen):
        longest = max(count(text) for text in _whole_captions(item, dataset.settings.subsets[item.subset]))
        if longest > limit:
            remarks.append(Remark(str(item.path), f"{about}{longest} tokens"))
    title = f"{_count(remarks, 'caption')} longer than {limit} tokens; the rest is cut off"
    cure = "shorten them, put what matters first, or train with --max_token_length 150 or 225"
    if not seen.asked.count_tokens:
        title += " (estimated)"
        cure += "; --tokenizer_cache_dir FOLDER counts exactly"
    return _finding("long_caption", Severity.HURTS, title, remarks, cure)


def enlarged_much(seen: Collection) -> Finding | None:
    """Images far smaller than their bucket."""
    remarks = _enlarged(seen, MOST_ENLARGED, math.inf)
    title = f"{_count(remarks, 'image')} enlarged more than {MOST_ENLARGED} times"
    cure = "use larger originals, bucket_no_upscale with enable_bucket, or a lower resolution"
    return _finding("tiny", Severity.HURTS, title, remarks, cure)


def enlarged_a_little(seen: Collection) -> Finding | None:
    """Images a little smaller than their bucket."""
    remarks = _enlarged(seen, 1.0, MOST_ENLARGED)
    title = f"{_count(remarks, 'image')} smaller than the bucket"
    return _finding("small", Severity.NOTE, title, remarks, "bucket_no_upscale would leave them at their size")


def cropped(seen: Collection) -> Finding | None:
    """Images of which much lies outside the picture."""
    remarks = []
    for dataset, item in _with_datasets(seen):
        part = 1 - item.bucket[0] * item.bucket[1] / (item.resized[0] * item.resized[1])
        if part > MOST_CROPPED and not dataset.settings.subsets[item.subset].random_crop:
            size = f"{item.size[0]}x{item.size[1]}"
            remarks.append(Remark(str(item.path), f"{size} loses {part:.0%} in {item.bucket[0]}x{item.bucket[1]}"))
    title = f"{_count(remarks, 'image')} cropped by more than {MOST_CROPPED:.0%}"
    cure = "turn on enable_bucket, lower min_bucket_reso or raise max_bucket_reso, or crop them by hand"
    return _finding("cropped", Severity.HURTS, title, remarks, cure)


def equal_images(seen: Collection) -> Finding | None:
    """The same file twice."""
    remarks = [_group(group) for group in equal_files(seen.looks)]
    cure = "keep one of each; num_repeats is the way to show an image more often"
    title = f"{_count(remarks, 'image')} there more than once, byte for byte"
    return _finding("duplicate", Severity.HURTS, title, remarks, cure)


def similar_images(seen: Collection) -> Finding | None:
    """The same picture in two files."""
    remarks = [_group(group) for group in alike_images(seen.looks)]
    title = f"{_count(remarks, 'group')} of images that look the same"
    return _finding("similar", Severity.NOTE, title, remarks, "keep the best of each, unless they are meant to count")


def misnamed(seen: Collection) -> Finding | None:
    """Files in another format than their name says."""
    remarks = [
        Remark(str(path), f"holds {look.kind}")
        for path, look in seen.looks.items()
        if path.suffix.lower() not in ENDINGS.get(look.kind, {f".{look.kind.lower()}"})
    ]
    cure = "they are read by their content; rename them for the sake of other programs"
    return _finding("misnamed", Severity.NOTE, f"{_count(remarks, 'image')} not of the named format", remarks, cure)


def lonely_buckets(seen: Collection) -> Finding | None:
    """Buckets whose only image always makes a batch of its own."""
    remarks = [
        Remark(f"{bucket.size[0]}x{bucket.size[1]}", str(dataset.items[bucket.items[0]].path))
        for dataset, bucket in _buckets(seen)
        if bucket.count < dataset.settings.batch_size and len(bucket.items) == 1
    ]
    cure = "crop these images to the shape of others, or raise bucket_reso_steps"
    return _finding("lonely_bucket", Severity.HURTS, f"{_count(remarks, 'bucket')} of one image", remarks, cure)


def short_batches(seen: Collection) -> Finding | None:
    """Batches that are not full because their bucket has too few images."""
    remarks = []
    for number, dataset in enumerate(seen.datasets, 1):
        size = dataset.settings.batch_size
        short = [bucket for bucket in dataset.buckets if bucket.count % size]
        if short and dataset.num_batches > 1:
            mean = effective_batch_size(dataset)
            listed = ", ".join(f"{b.size[0]}x{b.size[1]}: {b.count}" for b in short)
            remarks.append(Remark(f"dataset {number}", f"{mean:.2f} images in a batch of {size} on average ({listed})"))
    cure = "raise bucket_reso_steps for fewer buckets, lower batch_size, or choose repeats that fill the batches"
    title = "batches that are not full" + (f" in {_count(remarks, 'dataset')}" if len(seen.datasets) > 1 else "")
    return _finding("short_batch", Severity.NOTE, title, remarks, cure)


def broken_caches(seen: Collection) -> Finding | None:
    """Latents on disk that cannot be read or are not numbers."""
    remarks = []
    for folder, stems in _stems(seen).items():
        for file in sorted(folder.glob("*.npz")):
            name = file.stem
            beginnings = [name, *(name[:place] for place, letter in enumerate(name) if letter == "_")]
            reason = None if stems.isdisjoint(beginnings) else _cache_mistake(file)
            if reason:
                remarks.append(Remark(str(file), reason))
    title = f"{_count(remarks, 'cache file')} cannot be used"
    return _finding("broken_cache", Severity.HURTS, title, remarks, "delete them; the training makes them anew")


def said_by_the_trainer(seen: Collection) -> Finding | None:
    """What else reading the settings and folders warned of."""
    absent = {str(subset.source) for _, subset in _subsets(seen)}
    lines = [line for line in seen.log if line.partition(" is not used: ")[0] not in absent]
    remarks = [Remark(line) for line in dict.fromkeys(lines)]
    return _finding("unused", Severity.NOTE, "not used, or otherwise than it may seem", remarks, "see each line")


CHECKS: tuple[Check, ...] = (
    no_images,
    corrupt,
    misfits,
    bad_captions,
    bad_metadata,
    unpaired,
    missing_captions,
    empty_folders,
    long_captions,
    enlarged_much,
    cropped,
    equal_images,
    lonely_buckets,
    broken_caches,
    similar_images,
    enlarged_a_little,
    misnamed,
    blank_captions,
    short_batches,
    said_by_the_trainer,
)


def estimated_tokens(text: str) -> int:
    """About how many tokens a CLIP tokenizer makes of `text`: long words are several, each digit and mark is one."""

    def tokens(word: str) -> int:
        if not word[0].isalpha():
            return 1
        return -(-len(word.encode()) // (8 if word.isascii() else 2))

    return sum(tokens(word) for word in re.findall(r"[^\W\d_]+|\d|[^\s\w]+|_", text))


def _finding(kind: str, severity: Severity, title: str, remarks: list[Remark], cure: str) -> Finding | None:
    return Finding(kind, severity, title, tuple(dict.fromkeys(remarks)), cure) if remarks else None


def _count(remarks: list[Remark], thing: str, things: str = "") -> str:
    return counted(len(remarks), thing, things)


def _group(paths: list[Path]) -> Remark:
    return Remark(str(paths[0]), "also " + ", ".join(str(path) for path in paths[1:]))


def _enlarged(seen: Collection, above: float, at_most: float) -> list[Remark]:
    remarks = []
    for _, item in _with_datasets(seen):
        scale = max(item.resized[0] / item.size[0], item.resized[1] / item.size[1])
        # A side that is rounded up by a pixel is not enlarged.
        if above < scale <= at_most and max(item.resized[i] - item.size[i] for i in (0, 1)) > 1:
            text = f"{item.size[0]}x{item.size[1]} becomes {scale:.2f} times as large"
            remarks.append(Remark(str(item.path), text))
    return remarks


def _whole_captions(item: ImageItem, subset: SubsetSettings) -> list[str]:
    """What the caption may become when nothing of it is dropped."""
    settings = replace(
        subset.captions,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )
    return [
        render_caption(item.caption, settings, Random(draw), epoch=1, step=0, total_steps=1)
        for draw in range(DRAWS if settings.enable_wildcard else 1)
    ]


def _has_bad_file(seen: Collection, item: ImageItem) -> bool:
    return any(file.stem == item.path.stem and file.parent == item.path.parent for file in seen.findings.bad_captions)


def _stems(seen: Collection) -> dict[Path, set[str]]:
    stems: dict[Path, set[str]] = {}
    for path in seen.looks:
        stems.setdefault(path.parent, set()).add(path.stem)
    return stems


def _cache_mistake(file: Path) -> str | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                values = arrays[name]
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    return f"{name} holds values that are not numbers"
    except UNREADABLE as error:
        return str(error) or type(error).__name__
    return None


def _items(seen: Collection) -> Iterator[ImageItem]:
    return (item for _, item in _with_datasets(seen))


def _with_datasets(seen: Collection) -> Iterator[tuple[ImageSet, ImageItem]]:
    return ((dataset, item) for dataset in [*seen.datasets, *seen.held_out] for item in dataset.items)


def _buckets(seen: Collection) -> Iterator[tuple[ImageSet, Bucket]]:
    return ((dataset, bucket) for dataset in seen.datasets for bucket in dataset.buckets)


def _subsets(seen: Collection) -> Iterator[tuple[ImageSet, SubsetSettings]]:
    return ((dataset, subset) for dataset in seen.datasets for subset in dataset.settings.subsets)
