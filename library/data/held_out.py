"""How held-out images are shown: the same way every time, so that one validation can be compared with another."""

from __future__ import annotations

from dataclasses import replace

from library.data.config import CaptionSettings, DatasetSettings, SubsetSettings


def steady(settings: DatasetSettings) -> DatasetSettings:
    """`settings` without dropout, shuffling, warm-up, mirroring, changing crops and changing colours.

    Wildcards are still chosen, since the text with its braces is no caption.
    """
    return replace(settings, subsets=tuple(_steady_subset(subset) for subset in settings.subsets))


def _steady_subset(subset: SubsetSettings) -> SubsetSettings:
    return replace(
        subset,
        captions=_steady_captions(subset.captions),
        flip_aug=False,
        random_crop=False,
        color_aug=False,
        face_crop_aug_range=None,
    )


def _steady_captions(captions: CaptionSettings) -> CaptionSettings:
    return replace(
        captions,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )
