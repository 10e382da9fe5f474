from __future__ import annotations

import pytest

from library.flags.fsdp_launcher import Sharding, sets, sharding_of_launcher, strategies
from tests.clients.launcher import handed_on


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--multi_gpu", None),
        ("--use_fsdp", Sharding()),
        ("--use_fsdp --fsdp_version 2", Sharding()),
        ("--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward false", Sharding(frees_after_forward=False)),
        ("--use_fsdp --fsdp_reshard_after_forward SHARD_GRAD_OP", Sharding(frees_after_forward=False)),
        ("--use_fsdp --fsdp_sharding_strategy SHARD_GRAD_OP", Sharding(frees_after_forward=False)),
        ("--use_fsdp --fsdp_sharding_strategy 2", Sharding(frees_after_forward=False)),
        ("--use_fsdp --fsdp_sharding_strategy 1", Sharding()),
        ("--use_fsdp --fsdp_offload_params true", Sharding(waits_in_main_memory=True)),
        ("--use_fsdp --fsdp_forward_prefetch true", Sharding(fetches_ahead=True)),
    ],
)
def test_the_launcher_says_how_weights_are_divided(words: str, expected: Sharding | None) -> None:
    assert sharding_of_launcher(handed_on(*words.split())) == expected


@pytest.mark.parametrize("word", ["NO_SHARD", "3", "no_shard"])
def test_a_strategy_counts_that_differs_from_the_launchers_own(word: str) -> None:
    assert strategies(handed_on("--use_fsdp", "--fsdp_sharding_strategy", word)) == {"NO_SHARD"}
    assert strategies(handed_on("--use_fsdp", "--fsdp_reshard_after_forward", word)) == {"NO_SHARD"}


def test_a_value_that_is_the_launchers_own_sets_nothing() -> None:
    defaults = {"FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_AUTO_WRAP_POLICY": ""}
    assert not sets(defaults, handed_on("--use_fsdp"))
    assert sets(defaults, handed_on("--use_fsdp", "--fsdp_min_num_params", "5"))
    assert sets(defaults, handed_on("--use_fsdp", "--fsdp_auto_wrap_policy", "NO_WRAP"))
    assert not sets(defaults, handed_on("--multi_gpu", "--fsdp_min_num_params", "5"))
