"""Brackets in prompts mean what they have always meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.models.text.prompt_weights import parse_weights


def test_every_recorded_prompt_is_read_as_it_was(facts: Path) -> None:
    cases = json.loads((facts / "prompts" / "prompt_weights.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 40
    for case in cases:
        if case["parsed"] == "ValueError":
            with pytest.raises(ValueError, match="is not a weight, in the prompt"):
                parse_weights(case["text"])
            continue
        parsed = parse_weights(case["text"])
        assert [text for text, _ in parsed] == [text for text, _ in case["parsed"]], case["text"]
        assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in case["parsed"]])


def test_a_backslash_at_the_end_is_dropped() -> None:
    assert parse_weights("a\\") == [("a", 1.0)]
