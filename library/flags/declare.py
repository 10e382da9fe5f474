"""How a setting is declared: a field of a frozen dataclass is the flag, its type, its default and its help."""

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args

SCALARS = (bool, int, float, str, Path)


def flag(
    default: Any = None,
    help: str = "",
    *,
    type: Callable[[str], Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    names: str = "",
    unavailable: str = "",
    no_effect: str = "",
) -> Any:
    """A dataclass field that is also `--its_name`; a bool is a switch, a `tuple[x, ...]` takes any number of values.

    `type` reads one word of the command line and comes from the field's annotation when left out; `parse` turns
    the value into what the field holds and raises ValueError. `at_least` and `at_most` bound each number.
    `names` is what a path must lead to: "file", "folder", "weights" (either), "model" (either, or a hub id) or
    "thumbnail".
    `unavailable` says what a flag is for that is known but cannot be used yet, `no_effect` why one does nothing.
    """
    metadata = {
        "help": help,
        "type": type,
        "choices": choices,
        "parse": parse,
        "at_least": at_least,
        "at_most": at_most,
        "names": names,
        "unavailable": unavailable,
        "no_effect": no_effect,
    }
    return field(default=default, metadata=metadata)


def none_for_zero(value: float | None) -> float | None:
    """A strength of 0 is off, like no strength at all."""
    return value or None


def declared_flags(groups: Iterable[type]) -> dict[str, Field[Any]]:
    """Every flag of `groups` by its name."""
    found: dict[str, Field[Any]] = {}
    for group in groups:
        for declared in fields(group):
            assert declared.name not in found, f"--{declared.name} is declared twice"
            found[declared.name] = declared
    return found


def without_effect(declared: Field[Any], why: str) -> Field[Any]:
    """The same flag in a script that takes it, for the sake of a shared settings file, and does not read it."""
    idle = copy.copy(declared)
    changes = {"no_effect": why, "unavailable": "", "names": ""}
    idle.metadata = MappingProxyType({**declared.metadata, **changes})
    return idle


def with_choices(declared: Field[Any], choices: tuple[Any, ...]) -> Field[Any]:
    """The same flag in a script where other values may stand behind it."""
    changed = copy.copy(declared)
    changed.metadata = MappingProxyType({**declared.metadata, "choices": choices})
    return changed


def with_default(declared: Field[Any], default: Any) -> Field[Any]:
    """The same flag in a script that has another default."""
    changed = copy.copy(declared)
    changed.default = default
    return changed


def script_flags(
    groups: Iterable[type],
    idle: Mapping[str, str],
    absent: Mapping[str, str],
    choices: Mapping[str, tuple[Any, ...]],
) -> dict[str, Field[Any]]:
    """The flags of `groups` as one script has them: some `absent`, some `idle`, some with other `choices`."""
    flags = {name: declared for name, declared in declared_flags(groups).items() if name not in absent}
    flags |= {name: without_effect(flags[name], why) for name, why in idle.items()}
    return flags | {name: with_choices(flags[name], values) for name, values in choices.items()}


def title(group: type) -> str:
    """The heading of a group of flags: the first line of its docstring."""
    return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")


def is_switch(declared: Field[Any]) -> bool:
    """A flag without a value."""
    return declared.type is bool


def takes_many(declared: Field[Any]) -> bool:
    """A flag with any number of values: `tuple[x, ...]`, unless one text is parsed into the tuple."""
    return Ellipsis in _without_none(declared) and declared.metadata["type"] is None


def value_type(declared: Field[Any]) -> Callable[[str], Any] | None:
    """What reads one word of the command line; None for a switch."""
    if is_switch(declared):
        return None
    named = declared.metadata["type"]
    return named or next(part for part in _without_none(declared) if part in SCALARS)


def meaning(declared: Field[Any], default: Any) -> str:
    """The help of a flag whose default is `default`, in one line."""
    if declared.metadata["unavailable"]:
        return f"not available yet: {declared.metadata['unavailable']}"
    if declared.metadata["no_effect"]:
        return f"no effect: {declared.metadata['no_effect']}"
    text = declared.metadata["help"]
    return text if default is None or default is False or default == "" else f"{text} (default: {default})"


def add_flags(
    parser: argparse.ArgumentParser, group: type, flags: Mapping[str, Field[Any]], defaults: Mapping[str, Any]
) -> None:
    """Add every field of `group` to `parser` under the group's title; `defaults` holds this script's own defaults.

    The parser is not told any default, so that what it answers is what the user said.
    """
    section = parser.add_argument_group(title(group))
    for declared in (flags[own.name] for own in fields(group) if own.name in flags):
        assert declared.default is not MISSING, f"{group.__name__}.{declared.name} has no default"
        text = meaning(declared, defaults.get(declared.name, declared.default)).replace("%", "%%")
        if is_switch(declared):
            section.add_argument(f"--{declared.name}", action="store_true", help=text, default=argparse.SUPPRESS)
            continue
        choices = [choice for choice in declared.metadata["choices"] or () if choice is not None]
        section.add_argument(
            f"--{declared.name}",
            type=value_type(declared) or str,
            nargs="*" if takes_many(declared) else None,
            choices=choices or None,
            help=text,
        )


def _without_none(declared: Field[Any]) -> tuple[Any, ...]:
    """The types in an annotation such as `int | None` or `tuple[str, ...] | None`."""
    found: list[Any] = []
    pending = [declared.type]
    while pending:
        part = pending.pop(0)
        inner = get_args(part)
        if inner:
            pending.extend(inner)
        elif part is not NoneType:
            found.append(part)
    return tuple(found)
