"""Do typed lines change the request as they say, and nothing else?"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from library.generation.interactive import Turn, read_turn, turns
from library.models.architecture import ImageRequest

FIRST = ImageRequest("", width=1024, height=768, steps=20, guidance_scale=3.5, scale=1.0, seed=7)


def lines(*typed: str) -> Callable[[], str]:
    left = iter(typed)

    def ask() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


def test_every_option_reaches_its_field() -> None:
    turn = read_turn("a cat --w 512 --h 256 --s 4 --d 42 --g 1.5 --c 2 --n bad, ugly --m 1,0.5", FIRST)
    assert turn == Turn(
        ImageRequest("a cat", "bad, ugly", width=512, height=256, seed=42, steps=4, scale=2.0, guidance_scale=1.5),
        (1.0, 0.5),
    )


def test_a_value_may_follow_its_letter_directly_and_names_may_be_long() -> None:
    request = read_turn("a cat--w512 --Height 256 --steps=3".replace("=", " "), FIRST).request
    assert (request.prompt, request.width, request.height, request.steps) == ("a cat", 512, 256, 3)


def test_size_and_strength_stay_and_seed_and_negative_prompt_do_not() -> None:
    asked = [turn.request for turn in turns(FIRST, lines("a --w 512 --d 1 --n dark --c 2", "b", ""))]
    assert [one.prompt for one in asked] == ["a", "b"]
    assert (asked[1].width, asked[1].height, asked[1].scale) == (512, 768, 2.0)
    assert (asked[0].seed, asked[1].seed) == (1, None)
    assert (asked[0].negative_prompt, asked[1].negative_prompt) == ("dark", "")


def test_the_first_line_starts_from_the_sizes_of_the_command_line() -> None:
    (turn,) = turns(FIRST, lines("a cat"))
    assert (turn.request.width, turn.request.height, turn.multipliers) == (1024, 768, None)


def test_a_minus_is_no_negative_prompt() -> None:
    assert read_turn("a --n -", FIRST).request.negative_prompt == ""


def test_an_empty_line_ends_and_what_comes_later_is_not_asked_for() -> None:
    assert [turn.request.prompt for turn in turns(FIRST, lines("a", "  ", "b"))] == ["a"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --w wide", "--w wide: 'wide' is not a number"),
        ("a --d -1", "--d -1: -1 is below 0"),
        ("a --x 3", "--x 3 is not an option"),
        ("a --m 1,x", "--m 1,x: 'x' is not a number"),
        ("a --", "-- is not an option"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_asked_for_again(
    line: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        asked = [turn.request.prompt for turn in turns(FIRST, lines(line, "b"))]
    assert asked == ["b"] and caplog.messages[0].startswith(said)
