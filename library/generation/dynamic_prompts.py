"""Prompts with choices in braces: which prompts they stand for, and which seed each of them gets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

LARGEST_SEED = 2**32 - 1

_GROUP = re.compile(r"\{([^{}]*)\}")
_COUNT = re.compile(r"(\d+)(?:-(\d+))?")
_ESCAPES = {r"\{": "\0", r"\}": "\1"}


@dataclass(frozen=True)
class Group:
    """`{a|b}`, `{2$$a|b|c}`, `{1-2$$ and $$a|b|c}` or `{e$$a|b}`, without its braces."""

    options: tuple[str, ...]
    low: int = 1
    high: int = 1
    separator: str = ", "
    enumerates: bool = False
    """Stands for every combination instead of one."""

    def drawn(self, random: Random) -> str:
        """One combination; the count is drawn first, also when there is nothing to choose."""
        return self.separator.join(random.sample(self.options, random.randint(self.low, self.high)))

    def all(self) -> list[str]:
        """Every combination, the small ones first."""
        counts = range(self.low, self.high + 1)
        chosen = itertools.chain.from_iterable(itertools.combinations(self.options, count) for count in counts)
        return [self.separator.join(options) for options in chosen]


def expand(
    prompt: str, images_per_prompt: int, given_seeds: Sequence[int] | None, seed_of_seeds: Random
) -> tuple[list[str], list[int] | None]:
    r"""The prompts that `prompt` stands for, and the seed of each.

    The choices of an image depend on its seed alone; seeds that are not given are drawn. With an enumeration, all
    prompts get the first seed, so that they can be compared. Groups may be nested; `\{` and `\}` are braces. Without
    a group the prompt stands alone and the seeds are as they were given.
    """
    text = prompt
    for written, hidden in _ESCAPES.items():
        text = text.replace(written, hidden)
    if _GROUP.search(text) is None:
        return [_shown(text)], None if given_seeds is None else list(given_seeds)
    seeds = list(given_seeds or ())[:images_per_prompt]
    while len(seeds) < images_per_prompt:
        seeds.append(seed_of_seeds.randint(0, LARGEST_SEED))
    variants = [_variants(text, seed) for seed in seeds]
    prompts = [_shown(variant) for of_one_image in variants for variant in of_one_image]
    enumerates = "{e$$" in text
    return prompts, [seeds[0]] * len(prompts) if enumerates else seeds


def read_group(text: str) -> Group:
    """A group without its braces; more options than there are cannot be asked for, so the count is cut to them."""
    *heads, body = text.split("$$")
    options = tuple(body.split("|"))
    enumerates = heads[:1] == ["e"]
    if enumerates:
        heads = heads[1:]
    low = high = 1
    count = _COUNT.fullmatch(heads[0]) if heads else None
    if count is not None:
        heads = heads[1:]
        low, high = sorted((int(count[1]), int(count[2] or count[1])))
    low, high = min(low, len(options)), min(high, len(options))
    return Group(options, low, high, "$$".join(heads) if heads else ", ", enumerates)


def _variants(text: str, seed: int) -> list[str]:
    """What the prompt of the image with `seed` becomes: innermost groups first, each level with `seed` anew."""
    texts = [text]
    while any(_GROUP.search(text) for text in texts):
        random = Random(seed)
        texts = [filled for text in texts for filled in _one_level(text, random)]
    return texts


def _one_level(text: str, random: Random) -> Iterator[str]:
    """`text` without its innermost groups; every combination of the enumerations draws for itself, the last first."""
    matches = list(_GROUP.finditer(text))
    groups = [read_group(match[1]) for match in matches]
    spans = [match.span() for match in matches]
    for chosen in itertools.product(*(group.all() for group in groups if group.enumerates)):
        waiting = list(chosen)
        values = [waiting.pop() if group.enumerates else group.drawn(random) for group in reversed(groups)]
        yield _filled(text, spans, values[::-1])


def _filled(text: str, spans: Sequence[tuple[int, int]], values: Sequence[str]) -> str:
    """`text` with `values` in the place of `spans`."""
    for (start, end), value in reversed(list(zip(spans, values, strict=True))):
        text = text[:start] + value + text[end:]
    return text


def _shown(text: str) -> str:
    for written, hidden in _ESCAPES.items():
        text = text.replace(hidden, written[1])
    return text
