"""What `accelerate launch` was told about dividing weights (FSDP), as its processes hear of it.

The launcher turns its answers into FSDP_* variables and always sets them, so that one which stands at the launcher's
own default says nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

SWITCH = "ACCELERATE_USE_FSDP"
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""In the order of torch's numbers, which begin with 1."""
TRUE, FALSE = ("true", "1", "yes", "y", "t", "on"), ("false", "0", "no", "n", "f", "off")
FREE, KEEP = "FULL_SHARD", "SHARD_GRAD_OP"


@dataclass(frozen=True)
class Sharding:
    """How frozen weights are divided among the processes."""

    frees_after_forward: bool = True
    """Whole weights go after the forward pass and come again in backward."""
    waits_in_main_memory: bool = False
    """The part of a process lies in main memory and not on its device."""
    fetches_ahead: bool = False
    """In the forward pass too the next weights are on their way while some are calculated with."""


def sharding_of_launcher(environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """What the launcher asks for, or None when it does not use FSDP."""
    if not says_yes(environment, SWITCH):
        return None
    return Sharding(
        frees_after_forward=KEEP not in strategies(environment),
        waits_in_main_memory=says_yes(environment, "FSDP_OFFLOAD_PARAMS"),
        fetches_ahead=says_yes(environment, "FSDP_FORWARD_PREFETCH"),
    )


def strategies(environment: Mapping[str, str] = os.environ) -> set[str]:
    """The strategies that the launcher names, as torch spells them; none when it uses no FSDP.

    The older flag is `fsdp_sharding_strategy`, the newer one `fsdp_reshard_after_forward`, which may also be true or
    false. Each stands at the strategy that frees weights unless it is set, so that this one counts only alone.
    """
    if not says_yes(environment, SWITCH):
        return set()
    variables = ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD")
    named = {_strategy(environment.get(name, FREE)) for name in variables}
    return named - {FREE} if len(named) > 1 else named


def says_yes(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable is on."""
    return environment.get(name, "").lower() in TRUE


def divides(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher uses FSDP."""
    return says_yes(environment, SWITCH)


def asks_for(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher uses FSDP and has `name` switched on."""
    return divides(environment) and says_yes(environment, name)


def sets(defaults: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher uses FSDP and gives one of the variables in `defaults` another value."""
    return divides(environment) and any(environment.get(name, value) != value for name, value in defaults.items())


def _strategy(word: str) -> str:
    """`word` in torch's spelling; as it is when it is unknown."""
    name = word.upper()
    # 1 is on and the first strategy, which are the same.
    if name.isdigit() and 1 <= int(name) <= len(STRATEGIES):
        return STRATEGIES[int(name) - 1]
    return {**dict.fromkeys(TRUE, FREE), **dict.fromkeys(FALSE, KEEP)}.get(name.lower(), name)
