"""Captions against recorded cases."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from library.data.captions import render_caption
from library.data.config import CaptionSettings

CASES = json.loads((Path(__file__).resolve().parents[2] / "facts/dataset/captions.json").read_text(encoding="utf-8"))[
    "cases"
]
TEXTUAL_INVERSION = [case for case in CASES if "replacements" in case]
"""Replaced words belong to a kind of training that is not offered."""

MENDED = {"a, b ||| c, d, e": "a, b, c, d, e"}
"""Captions whose mark stays in the prompt where no tag operation is on; here it is removed."""


def render(caption: str, settings: CaptionSettings, seed: int = 0, epoch: int = 1, step: int = 0) -> str:
    return render_caption(caption, settings, Random(seed), epoch=epoch, step=step, total_steps=1000)


def is_mended(case: dict[str, Any]) -> bool:
    return case["settings"] == {"keep_tokens_separator": "|||"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in TEXTUAL_INVERSION])
def test_a_caption_becomes_the_recorded_prompt(case: dict[str, Any]) -> None:
    expected = MENDED[case["caption"]] if is_mended(case) else case["output"]
    settings = CaptionSettings(**case["settings"])
    assert render(case["caption"], settings, case["seed"], case.get("epoch", 1), case.get("step", 0)) == expected


def test_only_one_recorded_case_is_mended_and_three_are_out_of_scope() -> None:
    assert [case["caption"] for case in CASES if is_mended(case)] == list(MENDED)
    assert len(TEXTUAL_INVERSION) == 3


def test_captions_are_dropped_in_epochs_n_and_2n_counted_from_one() -> None:
    settings = CaptionSettings(caption_dropout_every_n_epochs=3)
    assert [render("x", settings, epoch=epoch) for epoch in range(1, 8)] == ["x", "x", "", "x", "x", "", "x"]


def test_as_many_numbers_are_drawn_as_recorded() -> None:
    for case in CASES:
        if case in TEXTUAL_INVERSION or case["rng"] != ["random"]:
            continue
        random, once = Random(case["seed"]), Random(case["seed"])
        render_caption(case["caption"], CaptionSettings(**case["settings"]), random, epoch=1, step=0, total_steps=9)
        once.random()
        assert random.getstate() == once.getstate()


def test_a_warm_up_that_ends_below_zero_leaves_no_tags() -> None:
    settings = CaptionSettings(token_warmup_step=100, token_warmup_min=0)
    assert render("a, b", settings, step=0) == ""
