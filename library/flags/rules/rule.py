"""How it is said that settings do not go together, or that one follows from another."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any


def always() -> bool:
    """A condition that holds for all settings."""
    return True


@dataclass(frozen=True)
class Rule:
    """Something about several flags that `holds` only when it is a mistake; its parameters name the flags it reads."""

    name: str
    holds: Callable[..., bool]
    message: str
    """May name flags in braces."""
    when: Callable[..., bool] = always
    """What has to hold as well, with parameters of its own; see `under`."""


@dataclass(frozen=True)
class Consequence:
    """When `holds`, `flag` becomes `value`, and the user hears why."""

    name: str
    holds: Callable[..., bool]
    flag: str
    value: Any
    """Or a function, whose parameters name the flags it reads like those of `holds`."""
    message: str


@dataclass(frozen=True)
class Rules:
    """What is to be said about one subject; `+` puts the rules of two subjects together."""

    mistakes: tuple[Rule, ...] = ()
    """The run is refused."""
    doubts: tuple[Rule, ...] = ()
    """The run goes on with a warning."""
    consequences: tuple[Consequence, ...] = ()
    """Drawn in their order, before anything else is looked at."""

    def __add__(self, other: "Rules") -> "Rules":
        return Rules(self.mistakes + other.mistakes, self.doubts + other.doubts, self.consequences + other.consequences)


def under(when: Callable[..., bool], *rules: Rule) -> tuple[Rule, ...]:
    """The `rules`, with a condition that they share."""
    return tuple(replace(rule, when=when) for rule in rules)


def broken(rules: Sequence[Rule], values: Mapping[str, Any], failed: AbstractSet[str] = frozenset()) -> list[str]:
    """Messages of the rules that hold. A rule about a flag that is not there, or whose value failed, is left out."""
    return [rule.message.format_map(values) for rule in rules if _hold((rule.when, rule.holds), values, failed)]


def with_consequences(
    consequences: Sequence[Consequence], values: Mapping[str, Any], failed: AbstractSet[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """The values that follow from the given ones, and a message for each that changed."""
    changed = dict(values)
    messages = []
    for consequence in consequences:
        if _hold((consequence.holds,), changed, failed):
            messages.append(consequence.message.format_map(changed))
            value = consequence.value
            changed[consequence.flag] = value(*_read(value, changed)) if callable(value) else value
    return changed, messages


def _hold(conditions: Sequence[Callable[..., bool]], values: Mapping[str, Any], failed: AbstractSet[str]) -> bool:
    names = [name for condition in conditions for name in _names(condition)]
    readable = all(name in values and name not in failed for name in names)
    return readable and all(condition(*_read(condition, values)) for condition in conditions)


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _read(function: Callable[..., Any], values: Mapping[str, Any]) -> list[Any]:
    return [values[name] for name in _names(function)]
