"""Prompts typed one after the other: what each line changes of the request before it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.models.architecture import ImageRequest

logger = logging.getLogger(__name__)

HELP = (
    "a prompt, then any of --w width --h height --s steps --d seed --g guidance --c cfg scale --n negative prompt "
    "(- for none) --m multipliers of the LoRA files, 1,0.5; size, steps, guidance and scale stay for the next prompt; "
    "an empty line ends"
)


@dataclass(frozen=True)
class Turn:
    """What one line asks for."""

    request: ImageRequest
    multipliers: tuple[float, ...] | None = None
    """Of the LoRA files, when the line gives them."""


def turns(first: ImageRequest, ask: Callable[[], str]) -> Iterator[Turn]:
    """The pictures that lines from `ask` want, until an empty one or the end of the input.

    `first` has the sizes and strengths to start from. A line that cannot be read is logged and asked for again.
    """
    standing = first
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        if not line:
            return
        try:
            turn = read_turn(line, standing)
        except ValueError as error:
            logger.error("%s", error)
            continue
        standing = turn.request
        yield turn


def read_turn(line: str, standing: ImageRequest) -> Turn:
    """`<prompt> --w 512 --n words ...`, where a value may follow its letter directly.

    Seed and negative prompt are new with every line, all else is as in `standing` unless the line says otherwise.

    Raises:
        ValueError: an unknown option, or a value that is no number.
    """
    prompt, *parts = line.split("--")
    changes: dict[str, Any] = {"prompt": prompt.strip(), "seed": None, "negative_prompt": ""}
    multipliers: tuple[float, ...] | None = None
    for part in parts:
        letter, value = part[:1].lower(), re.sub(r"^[A-Za-z]*", "", part, count=1).strip()
        if letter == "m":
            multipliers = tuple(_number(part, one, float) for one in value.split(","))
        elif letter == "n":
            changes["negative_prompt"] = "" if value == "-" else part[1:].strip()
        elif letter in _OPTIONS:
            name, kind = _OPTIONS[letter]
            changes[name] = _number(part, value, kind)
        else:
            raise ValueError(f"--{part.strip()} is not an option; {HELP}")
    return Turn(replace(standing, **changes), multipliers)


_OPTIONS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "d": ("seed", int),
    "g": ("guidance_scale", float),
    "c": ("scale", float),
}
"""First letter -> field of the request, and what its value is."""


def _number(part: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--{part.strip()}: {text!r} is not a number") from None
    if kind is int and value < 0:
        raise ValueError(f"--{part.strip()}: {value} is below 0")
    return value
