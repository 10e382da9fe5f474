"""Values of --network_args that choose layers: patterns with a number each, and lists of block numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from networks.core.options import NetworkArgs

logger = logging.getLogger(__name__)

REG_ARGS = ("network_reg_dims", "network_reg_lrs")


@dataclass(frozen=True)
class NamePatterns:
    """Regular expressions that are searched for in the names of adapters; the first that is found holds."""

    key: str
    """The argument they come from."""
    rules: tuple[tuple[re.Pattern[str], float], ...] = ()

    def find(self, name: str) -> tuple[int, float] | None:
        """The number of the rule that holds for `name`, and its value; None if none does."""
        for number, (pattern, value) in enumerate(self.rules):
            if pattern.search(name):
                return number, value
        return None

    def warn_of_unused(self, names: Iterable[str]) -> None:
        """Say which patterns hold for none of `names`, the adapters that there could be."""
        names = list(names)
        used = {found[0] for name in names if (found := self.find(name)) is not None}
        for number, (pattern, value) in enumerate(self.rules):
            if number not in used:
                hidden = any(pattern.search(name) for name in names)
                why = "an earlier pattern holds for all its layers" if hidden else "no layer has such a name"
                logger.warning("--network_args %s: %s=%g has no effect: %s", self.key, pattern.pattern, value, why)


def read_patterns(args: NetworkArgs, key: str, whole: bool) -> NamePatterns:
    """`pattern=number,pattern=number`; `whole` numbers only.

    A comma inside brackets or after a backslash belongs to the pattern, as does every `=` but the last.

    Raises:
        ValueError: a pair has no number, or a pattern is no regular expression.
    """
    rules = []
    for pair in split_outside_brackets(args.text(key) or ""):
        pattern, equals, number = pair.strip().rpartition("=")
        try:
            value = float(int(number) if whole else float(number))
        except ValueError:
            value = -1.0
        if not equals or not pattern or not 0 <= value < float("inf"):
            kind = "whole number" if whole else "number"
            raise ValueError(f"--network_args {key}: {pair.strip()!r} is not pattern={kind} of at least 0")
        try:
            rules.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(f"--network_args {key}: {pattern!r} is not a regular expression: {error}") from error
    return NamePatterns(key, tuple(rules))


def split_outside_brackets(text: str) -> list[str]:
    """The parts of `text` between commas, but for those in brackets and those after a backslash."""
    parts, depth, start, escaped = [], 0, 0, False
    for place, letter in enumerate(text):
        if escaped or letter == "\\":
            escaped = not escaped
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth = max(0, depth - 1)
        elif letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def read_indices(args: NetworkArgs, key: str, count: int) -> set[int]:
    """Which of `count` blocks `0,3,8-12` chooses; `all` are all, as without the argument, `none` or nothing is none.

    Raises:
        ValueError: a number is none, or there is no such block in this model.
    """
    text = (args.text(key) or "").strip() if key in args else "all"
    if text == "all":
        return set(range(count))
    if text in ("none", ""):
        return set()
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"--network_args {key}: {part.strip()!r} is neither a number nor a range such as 4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"--network_args {key}: the range {part.strip()} ends before it begins")
        if last >= count:
            raise ValueError(
                f"--network_args {key}: there is no block {last}: this model has {count}, 0 to {count - 1}"
            )
        chosen.update(range(first, last + 1))
    return chosen


def read_list(args: NetworkArgs, key: str, count: int) -> list[int] | None:
    """Exactly `count` whole numbers of at least 0, with or without brackets around them.

    Raises:
        ValueError: there are more or fewer, or one is no number.
    """
    if key not in args:
        return None
    parts = (args.text(key) or "").strip().removeprefix("[").removesuffix("]").split(",")
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise ValueError(
            f"--network_args {key}={args.text(key)}: expected {count} whole numbers, such as {_example(count)}"
        )
    return [int(part) for part in parts]


def _example(count: int) -> Sequence[int]:
    return [4, 2] * (count // 2) + [4] * (count % 2)
