"""Prompts with choices in braces."""

import json
from random import Random

import pytest

from library.generation.dynamic_prompts import expand

MENDED = "{3$$a|b}"
"""More options than there are: an error once, now as many as there are."""


def test_every_recorded_prompt_stands_for_the_recorded_ones(facts) -> None:
    cases = json.loads((facts / "prompts" / "dynamic_prompts.json").read_text(encoding="utf-8"))["cases"]
    checked = 0
    for case in cases:
        if case["prompt"] == MENDED:
            assert case["prompts"] == "ValueError"
            continue
        found = expand(case["prompt"], case["images_per_prompt"], case["given_seeds"], Random(case["seed_of_seeds"]))
        assert found == (case["prompts"], case["seeds"]), case
        checked += 1
    assert checked == len(cases) - 3


def test_more_options_than_there_are_give_all_of_them() -> None:
    prompts, seeds = expand(MENDED, 2, [1, 2], Random(0))
    assert [sorted(prompt.split(", ")) for prompt in prompts] == [["a", "b"], ["a", "b"]]
    assert seeds == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{e$$a|{e$$b|c}}", ["a", "b", "a", "c"]),
        (r"\{x\} only", ["{x} only"]),
        ("{e$$a|b} {e$$x}", ["a x", "b x"]),
    ],
)
def test_nested_enumerations_end(prompt: str, expected: list[str]) -> None:
    assert expand(prompt, 1, [5], Random(0))[0] == expected
