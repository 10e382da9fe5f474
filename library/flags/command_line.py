"""What the command line says: all of its mistakes, not only the first."""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

from library.flags.declare import add_flags, is_switch, script_flags, takes_many
from library.flags.elsewhere import scripts_with

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Reading:
    """What one source says: values by flag name, as argparse reads them, and what is wrong with the rest."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    """Flags that were given a value which cannot be read."""
    warnings: list[str] = field(default_factory=list)

    def over(self, other: "Reading") -> "Reading":
        """Both, where the values of this one win over those of `other`."""
        return Reading(
            other.values | self.values,
            self.errors + other.errors,
            self.failed | other.failed,
            self.warnings + other.warnings,
        )


class CommandLine:
    """argparse over groups of flags, asked one flag at a time so that one mistake does not hide the next."""

    def __init__(
        self,
        groups: Sequence[type],
        description: str,
        defaults: Mapping[str, Any],
        idle: Mapping[str, str] = NOTHING,
        absent: Mapping[str, str] = NOTHING,
        choices: Mapping[str, tuple[Any, ...]] = NOTHING,
    ) -> None:
        self.flags: dict[str, Field[Any]] = script_flags(groups, idle, absent, choices)
        self.idle = idle.keys()
        self.absent = absent
        self.parser = _Parser(
            description=description, usage="%(prog)s [--flag value ...]", argument_default=argparse.SUPPRESS
        )
        for group in groups:
            add_flags(self.parser, group, self.flags, defaults)

    def read(self, words: Sequence[str]) -> Reading:
        """The values of the flags in `words`; `--help` prints the help and ends the program."""
        reading = Reading()
        for words_of_flag in _split(words):
            try:
                reading.values.update(self.read_flag(words_of_flag))
            except ValueError as error:
                reading.errors.append(str(error))
                reading.failed.update(self._meant(words_of_flag[0]))
        return reading

    def read_flag(self, words: Sequence[str]) -> dict[str, Any]:
        """One flag and its values, such as `["--seed", "1"]`, as a value by name; ValueError says what is wrong.

        None is the value of a flag that is switched off, whatever stands in a place that counts less.
        """
        first, has_value, _ = words[0].partition("=")
        if has_value and first[2:] in self.flags and is_switch(self.flags[first[2:]]):
            raise ValueError(f"{first} is a switch: give it without a value, or leave it out")
        namespace, extras = self.parser.parse_known_args(list(words))
        if extras and extras[0] == words[0]:
            if first.startswith("--"):
                raise ValueError(self.unknown(first[2:], first))
            raise ValueError(f"{extras[0]!r} belongs to no flag; a value with blanks needs quotes")
        values = vars(namespace)
        if extras:
            raise ValueError(self._too_many(next(iter(values)), extras))
        # An empty text for a flag that is off by default, `--vae=""`, switches it off.
        given = {
            name: None if value == "" and self.flags[name].default is None else value for name, value in values.items()
        }
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def unknown(self, name: str, shown: str) -> str:
        """The message for a name that is no flag, with the nearest one that is."""
        if name.partition("=")[0] in self.absent:
            return f"{shown} is not a flag of this script: {self.absent[name]}"
        if scripts := scripts_with(name.partition("=")[0]):
            return f"{shown} is not a flag of this script but of {scripts}; leave it out here"
        near = difflib.get_close_matches(name, self.flags, n=1)
        hint = f"; did you mean {'--' if shown.startswith('--') else ''}{near[0]}?" if near else ""
        return f"{shown} is not a flag of this script{hint or '; --help lists them all'}"

    def _too_many(self, name: str, extras: Iterable[str]) -> str:
        takes = "is a switch and takes no value" if is_switch(self.flags[name]) else "takes one value"
        return f"--{name} {takes}, but {' '.join(extras)!r} follows; a value with blanks needs quotes"

    def _meant(self, word: str) -> set[str]:
        """The flags that `word`, whole or shortened, may have named."""
        name = word.partition("=")[0].removeprefix("--")
        return {name} if name in self.flags else {flag for flag in self.flags if flag.startswith(name)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def words_for(declared: Field[Any], value: Any) -> list[str]:
    """The command line that says `value`, taken from a settings file; ValueError when it cannot be said.

    A number may stand where text is expected, a whole number with a fraction of zero where an integer is, one
    value where many are, and a list of numbers where a text of numbers is read (`[512, 768]` for `512,768`).
    """
    name = f"--{declared.name}"
    if is_switch(declared):
        if value not in (True, False):
            raise ValueError(f"expected true or false, got {value!r}")
        return [name] if value else []
    if value == "" and declared.default is None:
        return []
    many = takes_many(declared)
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not many and not (declared.metadata["parse"] and _are_numbers(value)):
        raise ValueError(f"expected one value, got {value!r}")
    for part in parts:
        if isinstance(part, (bool, dict, list)):
            raise ValueError(f"expected text or a number, got {_toml(part)}")
    whole = int in (declared.type, *getattr(declared.type, "__args__", ()))
    texts = [str(int(part)) if whole and _is_whole(declared, part) else str(part) for part in parts]
    return [name, *texts] if many else [f"{name}={','.join(texts)}"]


def _is_whole(declared: Field[Any], part: Any) -> bool:
    # A share of the run, 1.0, is not one step.
    return isinstance(part, float) and part.is_integer() and float not in getattr(declared.type, "__args__", ())


def _are_numbers(parts: list[Any]) -> bool:
    return all(isinstance(part, (int, float)) for part in parts)


def _toml(part: Any) -> str:
    return {True: "true", False: "false"}[part] if isinstance(part, bool) else repr(part)


def _split(words: Sequence[str]) -> list[list[str]]:
    """Cut `words` before every flag; as in argparse, a word with a blank before any `=` is a value."""
    parts: list[list[str]] = []
    for word in words:
        is_flag = word == "-h" or (word.startswith("--") and " " not in word.partition("=")[0])
        if is_flag or not parts:
            parts.append([word])
        else:
            parts[-1].append(word)
    return parts
