from __future__ import annotations

from collections.abc import Callable

import pytest

from library.flags.dreambooth import DB_RULES
from library.flags.fsdp_launcher import SWITCH
from library.flags.rules.rule import broken
from library.flags.rules.sharding import SHARDING
from library.flags.settings import Settings

Read = Callable[..., Settings]
Refused = Callable[..., list[str]]

MISTAKES = {
    "FSDP that divides nothing": ("FSDP_SHARDING_STRATEGY=NO_SHARD", {"max_train_steps": 1}),
    "FSDP within machines": ("FSDP_RESHARD_AFTER_FORWARD=HYBRID_SHARD_ZERO2", {"max_train_steps": 1}),
    "an unknown way of dividing": ("FSDP_SHARDING_STRATEGY=HALF", {"max_train_steps": 1}),
    "several ways of dividing": ("ACCELERATE_USE_PARALLELISM_CONFIG=true", {"max_train_steps": 1}),
    "divided weights and swapped blocks": ("FSDP_VERSION=2", {"blocks_to_swap": 4}),
    "divided weights and layers that stay away": ("FSDP_VERSION=2", {"cpu_modulation": True}),
    "divided weights and DeepSpeed": ("FSDP_VERSION=2", {"deepspeed": True}),
    "divided weights and adapters that sit out": ("FSDP_VERSION=2", {"network_args": ("a=1", "module_dropout=0.1")}),
}
DOUBTS = {
    "groups of the launcher's own": "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP",
    "files of divided weights": "FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT",
    "fetching later": "FSDP_BACKWARD_PREFETCH=NO_PREFETCH",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets a variable as a launcher with FSDP does."""
    monkeypatch.setenv(SWITCH, "true")

    def set_variable(text: str) -> None:
        name, _, value = text.partition("=")
        monkeypatch.setenv(name, value)

    return set_variable


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_go_with_divided_weights_is_refused(
    launched: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    variable, values = MISTAKES[name]
    launched(variable)
    (message,) = (rule.message for rule in SHARDING.mistakes if rule.name == name)
    assert broken(SHARDING.mistakes, values) == [message.format_map(values)]
    monkeypatch.setenv(SWITCH, "false")
    assert broken(SHARDING.mistakes, values) == []


@pytest.mark.parametrize("name", DOUBTS)
def test_an_answer_to_the_launcher_without_effect_is_named(
    launched: Callable[[str], None], read: Read, name: str
) -> None:
    launched(DOUBTS[name])
    assert read().warnings == tuple(rule.message for rule in SHARDING.doubts if rule.name == name)


def test_every_rule_about_divided_weights_is_tried_out() -> None:
    assert {rule.name for rule in SHARDING.mistakes} == MISTAKES.keys()
    assert {rule.name for rule in SHARDING.doubts} == DOUBTS.keys()


def test_the_launchers_recomputation_is_that_of_the_run(launched: Callable[[str], None], read: Read) -> None:
    launched("FSDP_ACTIVATION_CHECKPOINTING=true")
    launched("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true")
    settings = read()
    assert settings.values()["gradient_checkpointing"] and settings.values()["cpu_offload_checkpointing"]
    assert len(settings.warnings) == 2 and "switches --gradient_checkpointing on" in settings.warnings[0]
    assert read("--gradient_checkpointing", "--cpu_offload_checkpointing").warnings == ()


def test_the_training_of_a_whole_model_is_not_divided(launched: Callable[[str], None]) -> None:
    (mistake,) = broken(DB_RULES.mistakes, {"max_train_steps": 1})
    assert "launch with --multi_gpu" in mistake
