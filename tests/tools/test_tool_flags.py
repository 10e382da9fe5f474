"""The tools for pictures and captions take the flags that they always took, and their page tells of them."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from library.flags import bucket_tool

TOOLS = {
    "resize_images_to_resolution": "tools__resize_images_to_resolution",
    "detect_face_rotate": "tools__detect_face_rotate",
    "canny": "tools__canny",
    "merge_captions_to_metadata": "finetune__merge_captions_to_metadata",
    "merge_dd_tags_to_metadata": "finetune__merge_dd_tags_to_metadata",
    "clean_captions_and_tags": "finetune__clean_captions_and_tags",
    "prepare_buckets_latents": "finetune__prepare_buckets_latents",
}

PAGE = (Path(__file__).resolve().parents[2] / "docs/dataset_tools.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python tools/(\w+)\.py (.+)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("name", TOOLS)
def test_flags_and_defaults_are_the_recorded_ones(name: str, facts: Path) -> None:
    recorded = json.loads((facts / f"cli/{TOOLS[name]}.json").read_text(encoding="utf-8"))["flags"]
    parser = parser_of(name)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert sorted(actions) == sorted(row["dest"] for row in recorded)
    for row in recorded:
        action = actions[row["dest"]]
        assert (action.option_strings or [row["dest"]]) == row["flags"]
        assert as_said(action.default) == as_said(row["default"]), row["dest"]
        assert isinstance(action, argparse._StoreTrueAction) == (row["kind"] == "store_true")
        assert action.choices is None or list(action.choices) == row["choices"]
        assert bool(action.required) == bool(row["required"])


def parser_of(name: str) -> argparse.ArgumentParser:
    """The command line of a tool, without its work."""
    if name == "prepare_buckets_latents":
        return bucket_tool.make_parser("")
    parser: argparse.ArgumentParser = importlib.import_module(name).make_parser()
    return parser


def as_said(default: Any) -> Any:
    """A default as it would stand on the command line."""
    if isinstance(default, tuple):
        return ",".join(str(part) for part in default)
    return default


@pytest.mark.parametrize("name", TOOLS)
def test_help_says_what_every_flag_does(name: str) -> None:
    parser = parser_of(name)
    assert all(action.help for action in parser._actions)
    assert len(parser.format_help().splitlines()) > len(parser._actions)


def test_every_tool_has_an_example() -> None:
    assert sorted({name for name, _ in COMMANDS}) == sorted(TOOLS)


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda part: part.split()[0])
def test_examples_are_taken(name: str, words: str) -> None:
    assert parser_of(name).parse_args(shlex.split(words))


def test_every_flag_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`--(\w+)", PAGE)) - {"help"}
    known = {action.dest for name in TOOLS for action in parser_of(name)._actions}
    assert named <= known, named - known


def test_links_within_the_page_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^## (.+)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
