"""A launcher with DeepSpeed asks for what the flags of the script say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_families import CACHE_LATENTS
from library.flags.run import DistributedFlags
from library.flags.settings import Settings

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]

VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
"""As `accelerate launch` sets them for the answers that `accelerate config` proposes, but for stage and device."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process of such a launcher."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "deepspeed" or None)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.usefixtures("launched")
def test_its_answers_are_flags_that_are_said_aloud(read: Read) -> None:
    settings = read("--save_state")
    flags = settings[DistributedFlags]
    assert (flags.deepspeed, flags.zero_stage, flags.offload_optimizer_device) == (True, 1, "cpu")
    assert flags.offload_param_device is None and not flags.zero3_init_flag
    assert settings.warnings == (
        "accelerate was launched with DeepSpeed: that is --deepspeed --zero_stage=1 --offload_optimizer_device=cpu "
        "here",
    )


@pytest.mark.usefixtures("launched")
def test_command_line_and_settings_file_win(read: Read, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("zero_stage = 2\noffload_optimizer_device = 'nvme'\n", encoding="utf-8")
    flags = read(f"--config_file={tmp_path / 'run'}", "--offload_optimizer_device=cpu")[DistributedFlags]
    assert (flags.zero_stage, flags.offload_optimizer_device) == (2, "cpu")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "--zero_stage=3 divides the trained weights themselves"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "--offload_optimizer_device=nvme belongs to ZeRO 3"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "accelerate was launched with a deepspeed_config_file"),
    ],
)
def test_what_cannot_be_is_refused_as_if_it_were_a_flag(
    refused: Refused, base: list[str], launched: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    launched.setenv(name, value)
    (mistake,) = refused(*base)
    assert mistake.startswith(said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "the gradient_accumulation_steps of the launcher do not count"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "the gradient_clipping of the launcher does not count"),
        ("ACCELERATE_GRADIENT_CLIPPING", "auto", None),
    ],
)
def test_numbers_of_the_launcher_that_do_not_count_are_named(
    read: Read, launched: pytest.MonkeyPatch, name: str, value: str, said: str | None
) -> None:
    launched.setenv(name, value)
    assert [warning.partition(":")[0] for warning in read().warnings[1:]] == ([said] if said else [])


@pytest.mark.parametrize("switch", ["false", None])
def test_without_its_switch_nothing_is_asked_for(read: Read, launched: pytest.MonkeyPatch, switch: str | None) -> None:
    launched.setenv("ACCELERATE_USE_DEEPSPEED", switch) if switch else launched.delenv("ACCELERATE_USE_DEEPSPEED")
    launched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings = read()
    assert not settings[DistributedFlags].deepspeed and settings.warnings == ()


@pytest.mark.usefixtures("launched")
def test_a_tool_that_updates_no_weights_takes_no_notice(base: list[str]) -> None:
    settings = CACHE_LATENTS.settings("a test", [word for word in base if not word.startswith("--output")])
    assert not settings[DistributedFlags].deepspeed
    assert not any("DeepSpeed" in warning for warning in settings.warnings)
