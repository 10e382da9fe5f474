"""Which kind of dataset a [[datasets]] table describes, and which keys each kind knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any


class Kind(Enum):
    """Where the captions of a dataset come from, and whether every image has a second one beside it."""

    FOLDERS = "folders"
    METADATA = "metadata_file"
    CONDITIONING = "conditioning_data_dir"


KINDS_OF_KEY: dict[str, tuple[Kind, ...]] = {
    "alpha_mask": (Kind.FOLDERS, Kind.METADATA),
    "cache_info": (Kind.FOLDERS, Kind.CONDITIONING),
    "caption_extension": (Kind.FOLDERS, Kind.CONDITIONING),
    "class_tokens": (Kind.FOLDERS, Kind.CONDITIONING),
    "is_reg": (Kind.FOLDERS,),
}
"""Keys that not every kind knows."""

REASONS = {
    ("alpha_mask", Kind.CONDITIONING): "the mask comes from conditioning_data_dir",
    ("is_reg", Kind.CONDITIONING): "regularisation images stand in folders of their own",
    ("cache_info", Kind.METADATA): "sizes stand in the metadata file, as image_size",
    ("caption_extension", Kind.METADATA): "captions stand in the metadata file",
    ("class_tokens", Kind.METADATA): "captions stand in the metadata file",
    ("is_reg", Kind.METADATA): "regularisation images stand in folders of their own",
}


def kind_of(subset: Mapping[str, Any]) -> Kind:
    """The kind of one subset, by its keys."""
    if subset.get("conditioning_data_dir") is not None:
        return Kind.CONDITIONING
    return Kind.FOLDERS if subset.get("metadata_file") is None else Kind.METADATA


def kind_mistakes(
    dataset: Mapping[str, Any], subsets: Sequence[tuple[str, Mapping[str, Any]]], place: str, *, conditioning: bool
) -> list[str]:
    """What is wrong with the keys of one dataset; `subsets` holds the place and the keys of each.

    Either every subset has a metadata_file, or every one a conditioning_data_dir, or none has either.
    Without `conditioning` the run has no use for conditioning images.
    """
    kinds = [kind_of(subset) for _, subset in subsets]
    mistakes = []
    for (name, subset), kind in zip(subsets, kinds, strict=True):
        if kind is Kind.CONDITIONING and subset.get("metadata_file") is not None:
            mistakes.append(f"{name}: metadata_file and conditioning_data_dir are for different kinds; keep one")
        elif kind is not kinds[0]:
            mistakes.append(_mixed(name, kind, kinds[0]))
        if kind is Kind.CONDITIONING and not conditioning:
            mistakes.append(
                f"{name}: conditioning_data_dir = {str(subset['conditioning_data_dir'])!r} would have no effect; "
                "expected --masked_loss with it, which takes the images as masks"
            )
        if subset.get("image_dir") is None and kind is not Kind.METADATA:
            mistakes.append(f"{name}: image_dir is missing; it names the folder of the images")
        mistakes += _foreign_keys(name, subset, kind)
    if kinds:
        mistakes += _foreign_keys(place, dataset, kinds[0])
    return mistakes


def _mixed(name: str, kind: Kind, first: Kind) -> str:
    here, there = (
        f"has {k.value}" if k is not Kind.FOLDERS else "has neither metadata_file nor conditioning_data_dir"
        for k in (kind, first)
    )
    return (
        f"{name}: it {here}, but subset 1 {there}; expected one kind in a dataset, so give it a [[datasets]] of its own"
    )


def _foreign_keys(place: str, keys: Mapping[str, Any], kind: Kind) -> list[str]:
    return [
        f"{place}: {key} = {keys[key]!r} cannot be used with {kind.value}: {REASONS[key, kind]}"
        for key, kinds in KINDS_OF_KEY.items()
        if keys.get(key) not in (None, False) and kind not in kinds
    ]
