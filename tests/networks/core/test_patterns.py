"""Patterns with numbers, and lists of blocks, are read as they were written."""

from __future__ import annotations

import logging

import pytest

from networks.core.options import NetworkArgs
from networks.core.patterns import read_indices, read_list, read_patterns, split_outside_brackets


def args(**values: str) -> NetworkArgs:
    return NetworkArgs(values, ("x",), "networks.lora_flux")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        (r"single_blocks_(\d|10)_=1e-3,double=2e-3", [r"single_blocks_(\d|10)_=1e-3", "double=2e-3"]),
        ("a{1,3}=1,[x,y]=2", ["a{1,3}=1", "[x,y]=2"]),
        (r"a\,b=1,\(c=2", [r"a\,b=1", r"\(c=2"]),
        ("a=1,,b=2,", ["a=1", "b=2"]),
        ("", []),
    ],
)
def test_a_comma_in_brackets_or_escaped_belongs_to_the_pattern(text: str, parts: list[str]) -> None:
    assert split_outside_brackets(text) == parts


def test_the_first_pattern_that_is_found_holds(caplog: pytest.LogCaptureFixture) -> None:
    patterns = read_patterns(args(x="attn=8, (?=x)img=2,img_attn=4"), "x", whole=True)
    assert patterns.find("img_attn") == (0, 8.0)
    assert patterns.find("ximg") is None
    assert patterns.find("txt") is None
    with caplog.at_level(logging.WARNING):
        patterns.warn_of_unused(["img_attn", "txt"])
    assert "(?=x)img=2 has no effect: no layer has such a name" in caplog.text
    assert "img_attn=4 has no effect: an earlier pattern holds for all its layers" in caplog.text


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("all", {0, 1, 2, 3, 4}), ("none", set()), ("", set()), ("0, 2-3", {0, 2, 3}), ("4", {4}), ("1 - 2", {1, 2})],
)
def test_blocks_are_chosen_by_numbers_and_ranges(text: str, chosen: set[int]) -> None:
    assert read_indices(args(x=text), "x", 5) == chosen
    assert read_indices(args(), "x", 5) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "there is no block 5: this model has 5, 0 to 4"),
        ("3-1", "ends before it begins"),
        ("-1", "neither a number"),
    ],
)
def test_blocks_that_are_not_there_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_indices(args(x=text), "x", 5)


@pytest.mark.parametrize("text", ["[4,2,0]", "4,2,0", " [4, 2, 0] "])
def test_lists_are_read_with_and_without_brackets(text: str) -> None:
    assert read_list(args(x=text), "x", 3) == [4, 2, 0]
    assert read_list(args(), "x", 3) is None


def test_lists_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x=1,2: expected 3 whole numbers, such as \[4, 2, 4\]"):
        read_list(args(x="1,2"), "x", 3)
