"""Everything the user said, read once and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

Group = TypeVar("Group")


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

    def given(self, name: str) -> bool:
        """Whether the user set `--name`."""
        return name in self.names_given

    def values(self) -> dict[str, Any]:
        """Every flag's value by its name."""
        return {f.name: getattr(group, f.name) for group in self.groups.values() for f in fields(group)}
