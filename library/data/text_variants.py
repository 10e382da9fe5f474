"""Which texts stand for the caption of an image when what is cached is their encoding."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from library.data.captions import render_caption
from library.data.config import CaptionSettings, SubsetSettings
from library.data.items import ImageItem


def variant_caption(item: ImageItem, settings: CaptionSettings, variant: int) -> str:
    """The caption of `item` with draws of its own for each `variant`; never dropped, which is decided when it is used.

    The draws come from the name of the image, so that a folder may move and keep its caches.
    """
    steady = replace(settings, caption_dropout_rate=0, caption_dropout_every_n_epochs=0)
    random = Random(f"variant {variant} of {item.path.name}")
    return render_caption(item.caption, steady, random, epoch=1, step=0, total_steps=1)


def variant_captions(item: ImageItem, settings: CaptionSettings, count: int) -> list[str]:
    """`count` variants, or one if the caption never changes."""
    texts = [variant_caption(item, settings, variant) for variant in range(count)]
    return texts if len(set(texts)) > 1 else texts[:1]


def refusal(subset: SubsetSettings, captions: list[str], variants: int) -> str | None:
    """Why the captions of a subset cannot be cached in encoded form, if so."""
    settings = subset.captions
    if settings.token_warmup_step > 0:
        return "token_warmup_step changes captions with every step and cannot be used with cached text; set it to 0"
    changing = {
        "shuffle_caption": settings.shuffle_caption,
        "caption_tag_dropout_rate": settings.caption_tag_dropout_rate > 0,
        "enable_wildcard": settings.enable_wildcard and any("\n" in text or "{" in text for text in captions),
    }
    named = [name for name, changes in changing.items() if changes]
    if named and variants == 1:
        return (
            f"{', '.join(named)} would be drawn once and never again, since text is cached; "
            "keep several variants of each caption with --text_cache_variants (such as 4), or turn it off"
        )
    return None
