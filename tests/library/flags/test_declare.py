from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path

import pytest

from library.flags.declare import declared_flags, flag, meaning, title
from library.flags.model import ModelFlags
from library.flags.trainers import TRAIN_NETWORK
from tests.library.flags.recorded import recorded_flags, signature

OURS = {
    "ema_decay",
    "cache_dtype",
    "allow_uncaptioned",
    "skip_corrupt",
    "activation_memory",
    "dry_run",
    "strict",
    "early_stop_patience",
    "max_nonfinite_steps",
}


def test_every_recorded_flag_of_train_network_is_declared_with_the_same_signature(facts: Path) -> None:
    flags = declared_flags(TRAIN_NETWORK)
    rows = recorded_flags(facts, "train_network")
    assert len(rows) == 193
    for name, row in rows.items():
        declared = flags[name]
        ours = signature(declared, declared.default) | {"dest": declared.name, "required": False}
        assert ours == {key: row.get(key) for key in ours}
        assert type(declared.default) is type(row["default"]), name


def test_exactly_these_flags_go_beyond_the_recorded_ones(facts: Path) -> None:
    assert declared_flags(TRAIN_NETWORK).keys() - recorded_flags(facts, "train_network").keys() == OURS


def test_every_flag_says_what_it_does_in_one_line() -> None:
    for name, declared in declared_flags(TRAIN_NETWORK).items():
        text = meaning(declared, declared.default)
        assert len(text) >= 5 and "\n" not in text, name
        assert text != name.replace("_", " ")


def test_every_group_has_a_title_and_stands_at_its_defaults() -> None:
    titles = [title(group) for group in TRAIN_NETWORK]
    assert len(set(titles)) == len(TRAIN_NETWORK)
    for group in TRAIN_NETWORK:
        assert group() == group(**{f.name: f.default for f in fields(group)})


def test_a_group_cannot_be_written_to() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelFlags().v2 = True  # type: ignore[misc]


def test_a_flag_declared_in_two_groups_is_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Again:
        """Again"""

        v2: bool = flag(False, "twice")

    with pytest.raises(AssertionError, match="--v2 is declared twice"):
        declared_flags([ModelFlags, Again])


def test_the_help_shows_a_default_only_where_there_is_one() -> None:
    flags = declared_flags(TRAIN_NETWORK)
    assert meaning(flags["lr_warmup_steps"], 0).endswith("(default: 0)")
    assert meaning(flags["learning_rate"], 2e-6).endswith("(default: 2e-06)")
    assert "default" not in meaning(flags["seed"], None)
    assert "default" not in meaning(flags["v2"], False)
