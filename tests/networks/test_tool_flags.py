"""The tools for LoRA files take the flags that they always took, and their pages tell of them."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"flux_lora_tools.md": ("convert_flux_lora", "flux_merge_lora", "flux_extract_lora")}
"""Page -> the tools it is about."""
TOOLS = [tool for tools in PAGES.values() for tool in tools]


def parser_of(name: str) -> argparse.ArgumentParser:
    """The command line of a tool, without its work."""
    parser: argparse.ArgumentParser = importlib.import_module(f"networks.{name}").make_parser()
    return parser


def examples(page: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^python networks/(\w+)\.py (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", TOOLS)
def test_flags_and_defaults_are_the_recorded_ones(name: str, facts: Path) -> None:
    recorded = json.loads((facts / f"cli/networks__{name}.json").read_text(encoding="utf-8"))["flags"]
    actions = {action.dest: action for action in parser_of(name)._actions if action.dest != "help"}
    assert sorted(actions) == sorted(row["dest"] for row in recorded)
    for row in recorded:
        action = actions[row["dest"]]
        assert action.option_strings == row["flags"]
        assert action.default == row["default"], row["dest"]
        assert action.nargs == row.get("nargs") or row["kind"] == "store_true"
        assert isinstance(action, argparse._StoreTrueAction) == (row["kind"] == "store_true")
        assert action.choices is None or list(action.choices) == row["choices"]
        assert bool(action.required) == bool(row["required"])


@pytest.mark.parametrize("name", TOOLS)
def test_help_says_what_every_flag_does(name: str) -> None:
    parser = parser_of(name)
    assert all(action.help for action in parser._actions)
    assert len(parser.format_help().splitlines()) > len(parser._actions)


@pytest.mark.parametrize("page", PAGES)
def test_every_tool_has_an_example_that_is_taken(page: str) -> None:
    assert sorted({name for name, _ in examples(page)}) == sorted(PAGES[page])
    for name, words in examples(page):
        assert parser_of(name).parse_args(shlex.split(words))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_the_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`--(\w+)", (DOCS / page).read_text(encoding="utf-8"))) - {"help"}
    known = {action.dest for name in PAGES[page] for action in parser_of(name)._actions}
    assert named <= known, named - known
