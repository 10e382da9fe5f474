"""Everything the user said, read once and never changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar, cast

from library.flags.command_line import CommandLine, Reading
from library.flags.config_file import config_path, read_config_file, write_config_file
from library.flags.deepspeed_launcher import words_of_launcher
from library.flags.retired import replace_retired
from library.flags.rules.every_run import EVERY_RUN
from library.flags.rules.rule import Rules, broken, with_consequences
from library.flags.values import wrong_number, wrong_path

Group = TypeVar("Group")


class SettingsError(ValueError):
    """Every mistake in the settings, one a line."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{count} in the settings:", *(f"  {mistake}" for mistake in mistakes)]))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True)
class Settings:
    """The flag groups of a run: `settings[NoiseFlags].noise_offset`."""

    groups: Mapping[type, Any]
    names_given: frozenset[str] = frozenset()
    """Flags that the user set, on the command line or in a file."""
    warnings: tuple[str, ...] = ()
    """What the user should hear about these settings once logging is set up."""
    fills_in: bool = field(default=False, repr=False)
    """A group that is not there stands at its defaults, instead of being a mistake of the program."""

    @staticmethod
    def of(*groups: Any) -> Settings:
        """Settings made of `groups`, every other group at its defaults; for code and tests without a command line."""
        given = {f.name for group in groups for f in fields(group) if getattr(group, f.name) != f.default}
        return Settings({type(group): group for group in groups}, frozenset(given), fills_in=True)

    def __getitem__(self, group: type[Group]) -> Group:
        if group not in self.groups and self.fills_in:
            return group()
        return cast(Group, self.groups[group])

    def takes(self, group: type) -> bool:
        """Whether the script has the flags of `group`."""
        return group in self.groups or self.fills_in

    def get(self, group: type[Group]) -> Group:
        """The group, at its defaults in a script that does not take it."""
        return cast(Group, self.groups[group]) if group in self.groups else group()

    def given(self, name: str) -> bool:
        """Whether the user set `--name`."""
        return name in self.names_given

    def values(self) -> dict[str, Any]:
        """Every flag's value by its name."""
        return {f.name: getattr(group, f.name) for group in self.groups.values() for f in fields(group)}


def read_settings(
    groups: Sequence[type],
    description: str,
    defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
    idle: Mapping[str, str] | None = None,
    rules: Rules | None = None,
    absent: Mapping[str, str] | None = None,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> Settings:
    """The settings that the command line and its `--config_file` give; `defaults` are this script's own.

    `idle` names flags that this script takes and does not read, and says why: they stay at their defaults.
    `absent` names flags of `groups` that this script does not take, and says what to do instead. `choices` are the
    values of flags that have others here.
    `rules` are about flags of this script alone; they come after those of every run.
    Ends the program with code 0 after `--help` and `--output_config`, with 1 when `--output_config` would
    overwrite a file, and with 2 and one message about all mistakes when there are any.
    """
    command_line = CommandLine(groups, description, defaults or {}, idle or {}, absent or {}, choices or {})
    try:
        reading = _read(command_line, argv)
        if reading.values.get("output_config") and not reading.errors:
            path = config_path(reading.values["config_file"])
            write_config_file(path, reading.values, command_line.flags, defaults or {})
            command_line.parser.exit(0, f"settings written to {path}\n")
        return _settings(groups, command_line, reading, defaults or {}, EVERY_RUN + (rules or Rules()))
    except FileExistsError as error:
        command_line.parser.exit(1, f"{error}\n")
    except SettingsError as error:
        command_line.parser.exit(2, f"{command_line.parser.prog}: {error}\n")


def _read(command_line: CommandLine, argv: Sequence[str] | None) -> Reading:
    """The command line over the file it names and over what the launcher says, with today's flags."""
    reading = command_line.read(sys.argv[1:] if argv is None else argv)
    name = reading.values.get("config_file")
    if reading.values.get("output_config"):
        if name is None:
            reading.errors.append("--output_config needs --config_file, the file to write")
    else:
        if name is not None:
            reading = reading.over(read_config_file(config_path(name), command_line))
        reading = reading.over(_launched(command_line))
    reading.values = {name: value for name, value in reading.values.items() if value is not None}
    try:
        reading.values, replaced = replace_retired(reading.values)
        reading.warnings += replaced
    except ValueError as error:
        reading.errors.append(str(error))
    return reading


def _launched(command_line: CommandLine) -> Reading:
    """What `accelerate launch` asks for in the place of the user."""
    words = words_of_launcher()
    if not words or "deepspeed" not in command_line.flags or "deepspeed" in command_line.idle:
        return Reading()
    reading = command_line.read(words)
    reading.warnings.append(f"accelerate was launched with DeepSpeed: that is {' '.join(words)} here")
    return reading


def _settings(
    groups: Sequence[type], command_line: CommandLine, reading: Reading, defaults: Mapping[str, Any], rules: Rules
) -> Settings:
    """Check everything and build the groups; SettingsError holds all that is wrong."""
    mistakes, warnings, failed = list(reading.errors), list(reading.warnings), set(reading.failed)
    values: dict[str, Any] = {}
    for name, declared in command_line.flags.items():
        default = defaults.get(name, declared.default)
        try:
            values[name] = _checked(declared, reading.values.get(name, default), default)
            if name in command_line.idle:
                values[name] = default
        except ValueError as error:
            values[name] = default
            mistakes.append(str(error))
            failed.add(name)
    idle = {name: f.metadata["no_effect"] for name, f in command_line.flags.items() if f.metadata["no_effect"]}
    failed |= idle.keys()
    values, followed = with_consequences(rules.consequences, values, failed)
    without_effect = _without_effect({name: why for name, why in idle.items() if name in reading.values})
    (mistakes if values.get("strict") and "strict" not in idle else warnings).extend(without_effect)
    mistakes += broken(rules.mistakes, values, failed)
    if mistakes:
        raise SettingsError(mistakes)
    warnings += followed + broken(rules.doubts, values, failed)
    built = {group: group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in groups}
    return Settings(MappingProxyType(built), frozenset(reading.values), tuple(warnings))


def _without_effect(given: Mapping[str, str]) -> list[str]:
    """A line for each reason why flags that were given have no effect."""
    reasons: dict[str, list[str]] = {}
    for name, why in given.items():
        reasons.setdefault(why, []).append(f"--{name}")
    return [
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: {why}" for why, names in reasons.items()
    ]


def _checked(declared: Field[Any], value: Any, default: Any) -> Any:
    """`value` as its field holds it; ValueError names the flag and what is wrong."""
    if declared.metadata["unavailable"] and value != default:
        raise ValueError(f"--{declared.name} is not available yet: {declared.metadata['unavailable']}")
    try:
        parse = declared.metadata["parse"]
        value = parse(value) if parse else value
    except ValueError as error:
        raise ValueError(f"--{declared.name}: {error}") from None
    wrong = wrong_number(declared, value) or wrong_path(declared, value)
    if wrong:
        raise ValueError(f"--{declared.name}: {wrong}")
    return value
