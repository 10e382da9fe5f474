"""Every recorded row about datasets and prompts is held by a test; what is not built yet is named."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FACTS = Path(__file__).resolve().parent / "facts"
Test = Callable[..., None]

ROWS: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {
    ("dataset/batch_order", "cases"): (3, ("data.test_batch_order.test_buckets_and_batches_are_as_recorded_*",)),
    ("dataset/bucketing", "tables"): (16, ("data.test_buckets.test_every_image_gets_the_recorded_bucket_*",)),
    ("dataset/bucketing", "bucketing_disabled"): (2, ("data.test_buckets.test_without_buckets_the_recorded_*",)),
    ("dataset/captions", "cases"): (
        69,
        (
            "data.test_captions.test_a_caption_becomes_the_recorded_prompt",
            "data.test_captions.TEXTUAL_INVERSION",  # words are replaced there; that training is not offered
        ),
    ),
    ("dataset/finetune_tools", "clean_tags"): (16, ("data.test_caption_cleaning.test_tags_are_cleaned_as_*",)),
    ("dataset/finetune_tools", "clean_captions"): (9, ("data.test_caption_cleaning.test_captions_are_cleaned_as_*",)),
    ("dataset/images", "cases"): (
        60,
        (
            "data.test_pixels.test_scaling_gives_the_recorded_pixels",
            "data.test_pixels.test_crops_give_the_recorded_pixels",
            "data.test_augment.test_colours_change_as_recorded",
            "data.test_augment.test_face_crops_lie_where_recorded",
        ),
    ),
    ("dataset/registry", "cases"): (46, ("data.test_registry.FOLLOWED", "data.test_registry.MENDED")),
    ("prompts/prompt_lines", "cases"): (
        25,
        ("generation.test_prompt_line.test_a_line_reads_as_recorded_or_as_mended",),
    ),
}
"""Section of a fact file -> its rows, and the parametrized tests (or lists of cases) that share them."""

WHOLE: dict[tuple[str, str], tuple[int, str]] = {
    ("dataset/schema", "keys"): (38, "data.test_config.test_every_published_key_is_known_at_its_levels_*"),
    ("prompts/prompt_chunks", "training"): (66, "models.text.test_tokens.test_training_captions_are_cut_as_recorded"),
    ("prompts/prompt_chunks", "gen_img"): (60, "models.text.test_tokens.test_prompts_of_pictures_get_as_many_rows_*"),
    ("prompts/dynamic_prompts", "cases"): (
        60,
        "generation.test_dynamic_prompts.test_every_recorded_prompt_stands_for_*",
    ),
    ("prompts/prompt_weights", "cases"): (52, "models.text.test_prompt_weights.test_every_recorded_prompt_is_read_*"),
}
"""Section -> its rows, and the test that goes through all of them in a loop."""

PROSE = {("prompts/tokenizers", "tokenizer_ids"), ("prompts/tokenizers", "token_limits")}
"""Sections that say in words what tests of the tokenizers hold in their own."""


def found(name: str) -> Any:
    """What `data.test_x.name` or `data.test_x.beginning_*` is."""
    module_name, _, wanted = name.rpartition(".")
    module = importlib.import_module(f"tests.library.{module_name}")
    names = [n for n in vars(module) if n == wanted or (wanted.endswith("*") and n.startswith(wanted[:-1]))]
    assert len(names) == 1, f"{name}: {names}"
    return getattr(module, names[0])


def num_rows(name: str) -> int:
    held = found(name)
    if not callable(held):
        return len(held)
    (rows,) = (mark.args[1] for mark in held.pytestmark if mark.name == "parametrize")
    return len(list(rows))


def section(file: str, name: str) -> Any:
    return json.loads((FACTS / f"{file}.json").read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("place", ROWS, ids=" ".join)
def test_as_many_rows_are_tested_as_were_recorded(place: tuple[str, str]) -> None:
    count, tests = ROWS[place]
    assert len(section(*place)) == count == sum(num_rows(test) for test in tests)


@pytest.mark.parametrize("place", WHOLE, ids=" ".join)
def test_a_loop_goes_through_a_whole_section(place: tuple[str, str]) -> None:
    count, test = WHOLE[place]
    assert len(section(*place)) == count
    assert f'"{place[1]}"' in inspect.getsource(found(test))


def test_every_file_of_facts_is_in_a_table() -> None:
    files = {path.relative_to(FACTS).with_suffix("").as_posix() for path in FACTS.glob("*/*.json")}
    files = {file for file in files if file.startswith(("dataset/", "prompts/"))}
    assert files == {file for file, _ in [*ROWS, *WHOLE, *PROSE]}


def test_mended_rows_are_few_and_said_why() -> None:
    mended = found("data.test_registry.MENDED")
    assert len(mended) <= 12 and all(reason for reason in mended.values())
    assert len(found("data.test_captions.MENDED")) == 1
