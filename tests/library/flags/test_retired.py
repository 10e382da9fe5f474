from __future__ import annotations

from collections.abc import Callable

import pytest

from library.flags.dataset import CaptionFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.retired import RetiredFlags
from library.flags.settings import Settings

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]


@pytest.mark.parametrize(("name", "optimizer"), [("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")])
def test_an_old_optimizer_switch_sets_optimizer_type(read: Read, name: str, optimizer: str) -> None:
    settings = read(f"--{name}")
    assert settings[OptimizerFlags].optimizer_type == optimizer
    assert settings.given("optimizer_type")
    assert settings[RetiredFlags] == RetiredFlags()
    assert settings.warnings == (f"--{name} is the old spelling of --optimizer_type={optimizer}",)


def test_the_misspelt_caption_extension_wins_with_a_warning(read: Read) -> None:
    settings = read("--caption_extention=.txt", "--caption_extension=.cap")
    assert settings[CaptionFlags].caption_extension == ".txt"
    assert len(settings.warnings) == 1


@pytest.mark.parametrize(
    "words", [["--use_8bit_adam", "--use_lion_optimizer"], ["--use_8bit_adam", "--optimizer_type=AdamW8bit"]]
)
def test_two_choices_of_an_optimizer_are_refused(refused: Refused, base: list[str], words: list[str]) -> None:
    (mistake,) = refused(*base, *words)
    assert mistake == f"{' and '.join(word.partition('=')[0] for word in words)} both choose the optimizer; keep one"
