"""What (words:1.2), (words) and [words] in a prompt mean."""

from __future__ import annotations

import re
from itertools import groupby

ROUND_FACTOR = 1.1
"""What a pair of ( ) without a number multiplies by; [ ] divides by it."""


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Split `text` into pieces with their weights; neighbours of equal weight are one piece.

    `(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nested factors multiply. A backslash before a bracket or a
    backslash makes it text, any other is dropped. An unclosed bracket reaches to the end of the text, a closing one
    without a partner is text.

    Raises:
        ValueError: a weight is not a number, as in `(x:1.2.3)`.
    """
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    position = 0
    while position < len(text):
        letter = text[position]
        number = _NUMBER.match(text, position) if opened["("] else None
        position += 1
        if letter == "\\":
            if position < len(text) and text[position] in "()[]\\":
                letters.append(text[position])
                weights.append(1.0)
                position += 1
        elif letter in opened:
            opened[letter].append(len(letters))
        elif number is not None:
            multiply("(", _weight(number[1], text))
            position = number.end()
        elif letter == ")" and opened["("]:
            multiply("(", ROUND_FACTOR)
        elif letter == "]" and opened["["]:
            multiply("[", 1 / ROUND_FACTOR)
        else:
            letters.append(letter)
            weights.append(1.0)
    for bracket, factor in (("(", ROUND_FACTOR), ("[", 1 / ROUND_FACTOR)):
        while opened[bracket]:
            multiply(bracket, factor)
    pairs = groupby(zip(letters, weights), key=lambda pair: pair[1])
    return [("".join(letter for letter, _ in run), weight) for weight, run in pairs] or [("", 1.0)]


_NUMBER = re.compile(r":([+-]?[.\d]+)\)")


def _weight(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise ValueError(f"{number!r} is not a weight, in the prompt {text!r}") from error
