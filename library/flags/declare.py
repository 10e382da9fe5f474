"""How a setting is declared: a field of a frozen dataclass is the flag, its type, its default and its help."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType
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
) -> Any:
    """A dataclass field that is also `--its_name`; a bool is a switch, a `tuple[x, ...]` takes any number of values.

    `type` reads one word of the command line and comes from the field's annotation when left out; `parse` turns
    the value into what the field holds and raises ValueError. `at_least` and `at_most` bound each number.
    `names` is what a path must lead to: "file", "folder", "model" (either, or a hub id) or "thumbnail".
    `unavailable` says what a flag is for that is known but cannot be used yet.
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
    }
    return field(default=default, metadata=metadata)


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


def add_flags(parser: argparse.ArgumentParser, group: type, defaults: Mapping[str, Any]) -> None:
    """Add every field of `group` to `parser` under the group's title; `defaults` holds this script's own defaults."""
    section = parser.add_argument_group(title(group))
    for declared in fields(group):
        default = defaults.get(declared.name, declared.default)
        assert default is not MISSING, f"{group.__name__}.{declared.name} has no default"
        section.add_argument(f"--{declared.name}", **_arguments(declared, default))


def _arguments(declared: Field[Any], default: Any) -> dict[str, Any]:
    """What argparse is told about one flag."""
    meaning = declared.metadata["help"]
    if declared.metadata["unavailable"]:
        meaning = f"not available yet: {declared.metadata['unavailable']}"
    if is_switch(declared):
        return {"action": "store_true", "default": default, "help": meaning.replace("%", "%%")}
    if default not in (None, "", ()):
        meaning = f"{meaning} (default: {default})"
    arguments = {"type": value_type(declared), "default": default, "help": meaning.replace("%", "%%")}
    choices = declared.metadata["choices"]
    if choices:
        arguments["choices"] = choices
        arguments["metavar"] = "{" + ",".join(str(choice) for choice in choices if choice is not None) + "}"
    if takes_many(declared):
        arguments["nargs"] = "*"
    return arguments


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
