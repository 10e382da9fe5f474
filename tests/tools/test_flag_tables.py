from __future__ import annotations

from pathlib import Path

import pytest

import flag_tables
from library.flags.declare import declared_flags, script_flags
from library.flags.trainers import TRAIN_NETWORK

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", flag_tables.PAGES)
def test_the_tables_of_a_page_are_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert flag_tables.with_tables(page, name) == page, "run: python tools/flag_tables.py --write"


def test_every_flag_stands_in_the_tables_once() -> None:
    text = flag_tables.tables_of("docs/train_network.md")
    for name in declared_flags(TRAIN_NETWORK):
        assert text.count(f"`--{name}`") == 1, name


def test_a_row_shows_choices_and_default_and_keeps_to_its_cells() -> None:
    flags = declared_flags(TRAIN_NETWORK)
    assert flag_tables.row(flags["mixed_precision"]) == (
        "| `--mixed_precision` | `no`, `fp16`, `bf16` | `no` | number format of the calculation |\n"
    )
    assert "{a\\|b}" in flag_tables.row(flags["enable_wildcard"])
    assert "| number ... |" in flag_tables.row(flags["text_encoder_lr"])


def test_a_flag_without_effect_in_a_script_says_why() -> None:
    flags = script_flags(TRAIN_NETWORK, {"v2": "the model is another"}, {}, {})
    text = flag_tables.tables(TRAIN_NETWORK, flags)
    assert "| `--v2` | switch |  | no effect: the model is another |" in text


def test_a_page_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no lines"):
        flag_tables.with_tables("nothing here", "docs/train_network.md")
