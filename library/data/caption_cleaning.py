"""How the tags and captions that programs wrote are put in order."""

from __future__ import annotations

import re

SMILE = "^_^"
"""The one tag that keeps its underscore."""

RATING = "rating"
"""A tag that begins so, and all tags after it, say how decent a picture is, not what it shows."""

SEVERAL = re.compile(r"girls|boys")
"""In the tags of a picture of several people, where colours and cuts of one cannot be told from those of another."""

COLOURS = (
    "amber|aqua|black|blond|blonde|blue|brown|gold|golden|gray|green|grey|orange|pink|purple|red|silver|violet|white"
    "|yellow"
)
HAIR_LENGTHS = re.compile(r"(long|medium|short) hair")
HAIR_COLOURS = re.compile(rf"((dark|light) )?({COLOURS}) hair")
GROUPS = (
    HAIR_LENGTHS,
    re.compile(r"(bob|hime) cut"),
    re.compile(rf"((dark|light) )?({COLOURS}) eyes"),
    re.compile(r"sleeveless|(long|short) sleeves"),
    re.compile(r"((high|low|short|side) )?ponytail|((low|short) )?twintails|((french|side|single|twin) )?braids?"),
    HAIR_COLOURS,
)
"""Kinds of tags of which one picture of one person has one each."""

ENDS_OF_LONGER = re.compile(r"[\w-]+|hair ornament")
"""Tags that say nothing beside a longer tag which ends in them: `shirt` beside `white shirt`."""

REPLACEMENTS = (
    ("anime anime", "anime"),
    (r"young (?=\w)", ""),
    ("(anime|cartoon) (character|female|girl|lady|person|woman)", "girl"),
    ("(anime|cartoon) (characters|females|girls|ladies|people|persons|women)", "girls"),
    ("lady|female|woman|person", "girl"),
    ("ladies|females|women|people|persons", "girls"),
    ("a cartoon (figure|picture|drawing|painting)", r"a \1"),
    ("an? (anime )?cartoon image", "an image"),
    ("girl girl", "girl"),
    ("girls girls", "girls"),
)
"""What is written in place of what, in this order; only whole words count, so that `personal` stays what it is."""


def clean_tags(tags: str) -> str:
    """`tags` with blanks for underscores and without ratings, doubtful traits of several people, and repetitions."""
    names = [tag.strip() for tag in tags.split(",")]
    names = [name if name == SMILE else name.replace("_", " ") for name in names if name]
    names = names[: next((n for n, name in enumerate(names) if n and name.startswith(RATING)), len(names))]
    if any(SEVERAL.search(name) for name in names):
        for group in GROUPS:
            if sum(group.fullmatch(name) is not None for name in names) >= 2:
                names = [name for name in names if not group.fullmatch(name)]
    return ", ".join(name for name in names if not _ends_another(name, names))


def clean_caption(caption: str) -> str:
    """`caption` with one word for people, and without words about the style of the picture."""
    for wanted, replacement in REPLACEMENTS:
        before = None
        while caption != before:  # what is left may be the same words again: girl girl girl
            before, caption = caption, re.sub(rf"\b(?:{wanted})\b", replacement, caption)
    return caption


def _ends_another(name: str, names: list[str]) -> bool:
    return bool(ENDS_OF_LONGER.fullmatch(name)) and any(other.endswith(f" {name}") for other in names)
