"""What a caption becomes each time it is used: drop it, choose wildcards, shuffle, drop and warm up tags."""

from __future__ import annotations

import math
import re
from random import Random

from library.data.config import CaptionSettings

OPEN, CLOSE = "\x00", "\x01"
"""Stand in for {{ and }} while choices are made; no text file holds them."""


def render_caption(
    caption: str, settings: CaptionSettings, random: Random, *, epoch: int, step: int, total_steps: int
) -> str:
    """The prompt made of `caption` this time; equal arguments give equal prompts.

    `epoch` counts from 1, `step` is the number of optimizer steps done, of `total_steps`. A dropped caption is
    the empty string. Draws come in the order: dropout, line, choices from left to right, shuffle, dropped tags.
    """
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    if settings.caption_suffix:
        caption = f"{caption} {settings.caption_suffix}"
    if is_dropped(settings, random, epoch):
        return ""
    caption = _choose(caption, random) if settings.enable_wildcard else caption.split("\n")[0]
    if _has_tag_operations(settings) or _has_mark(caption, settings):
        caption = _arrange_tags(caption, settings, random, step, total_steps)
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.caption_separator)
    return caption


def is_dropped(settings: CaptionSettings, random: Random, epoch: int) -> bool:
    """Whether the caption is empty this time; draws once if there is a rate."""
    rate, every = settings.caption_dropout_rate, settings.caption_dropout_every_n_epochs
    if rate > 0 and random.random() < rate:
        return True
    return every > 0 and epoch % every == 0


def _choose(caption: str, random: Random) -> str:
    """One line, with one option of each {a|b}; groups do not nest, {{ and }} are braces."""
    if "\n" in caption:
        caption = random.choice(caption.split("\n"))
    caption = caption.replace("{{", OPEN).replace("}}", CLOSE)
    caption = re.sub(r"\{([^}]+)\}", lambda group: random.choice(group[1].split("|")), caption)
    return caption.replace(OPEN, "{").replace(CLOSE, "}")


def _has_tag_operations(settings: CaptionSettings) -> bool:
    return settings.shuffle_caption or settings.token_warmup_step > 0 or settings.caption_tag_dropout_rate > 0


def _has_mark(caption: str, settings: CaptionSettings) -> bool:
    return bool(settings.keep_tokens_separator) and settings.keep_tokens_separator in caption


def _arrange_tags(caption: str, settings: CaptionSettings, random: Random, step: int, total_steps: int) -> str:
    """Shorten, shuffle and drop the tags between the fixed ones."""
    head, tags, tail = _split_tags(caption, settings)
    tags = tags[: _warm_up_count(len(tags), settings, step, total_steps)]
    if settings.shuffle_caption:
        random.shuffle(tags)
    rate = settings.caption_tag_dropout_rate
    if rate > 0:
        tags = [tag for tag in tags if random.random() >= rate]
    return ", ".join(head + tags + tail)


def _split_tags(caption: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, tags that move, tags that stay at the end."""
    if _has_mark(caption, settings):
        parts = caption.split(settings.keep_tokens_separator, 2)
        head, tags, tail = ([tag for tag in _tags(part, settings) if tag] for part in [*parts, ""][:3])
        return head, tags, tail
    tags = _tags(caption, settings)
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _tags(text: str, settings: CaptionSettings) -> list[str]:
    return [tag.strip() for tag in text.strip().split(settings.caption_separator)]


def _warm_up_count(num_tags: int, settings: CaptionSettings, step: int, total_steps: int) -> int:
    """How many of the moving tags are used at `step`."""
    whole = settings.token_warmup_step
    if whole < 1:
        whole = math.floor(whole * total_steps)
    if step >= whole:
        return num_tags
    start = settings.token_warmup_min
    return max(math.floor(step * ((num_tags - start) / whole)) + start, 0)
