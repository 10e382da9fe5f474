"""Tags and captions are cleaned as recorded, and no more than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data.caption_cleaning import clean_caption, clean_tags

RECORDED = json.loads(
    (Path(__file__).resolve().parents[2] / "facts/dataset/finetune_tools.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("row", RECORDED["clean_tags"], ids=lambda row: row["in"] or "nothing")
def test_tags_are_cleaned_as_recorded(row: dict[str, str]) -> None:
    assert clean_tags(row["in"]) == row["out"]


@pytest.mark.parametrize("row", RECORDED["clean_captions"], ids=lambda row: row["in"])
def test_captions_are_cleaned_as_recorded(row: dict[str, str]) -> None:
    assert clean_caption(row["in"]) == row["out"]


@pytest.mark.parametrize("text", [row["in"] for row in RECORDED["clean_tags"]])
def test_cleaning_tags_again_changes_nothing(text: str) -> None:
    assert clean_tags(clean_tags(text)) == clean_tags(text)


@pytest.mark.parametrize("text", [row["in"] for row in RECORDED["clean_captions"]])
def test_cleaning_a_caption_again_changes_nothing(text: str) -> None:
    assert clean_caption(clean_caption(text)) == clean_caption(text)


@pytest.mark.parametrize(
    "caption", ["a personal computer", "the salesperson", "a landlady", "cartoonish", "a younger brother", ""]
)
def test_parts_of_words_are_left_alone(caption: str) -> None:
    assert clean_caption(caption) == caption


@pytest.mark.parametrize(
    ("tags", "clean"),
    [
        ("girl,smile ,, hat", "girl, smile, hat"),
        ("2girls, closed eyes, blue eyes", "2girls, closed eyes, blue eyes"),
        ("2girls, wet hair, black hair", "2girls, wet hair, black hair"),
        ("boys, braid, side ponytail", "boys"),
        ("1girl, bow, hair bow, bowl", "1girl, hair bow, bowl"),
        ("solo, rating:safe, later", "solo"),
        ("^_^, a_^_^", "^_^, a ^ ^"),
    ],
)
def test_other_tags(tags: str, clean: str) -> None:
    assert clean_tags(tags) == clean


def test_words_that_come_together_again_are_replaced_again() -> None:
    assert clean_caption("anime anime anime anime cat, a woman woman woman lady") == "anime cat, a girl"
