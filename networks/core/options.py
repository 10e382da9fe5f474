"""--network_args, text in, values out."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_BOOLEANS = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}


class NetworkArgs:
    """The `key=value` pairs of --network_args; every getter gives None for a key that is absent.

    Raises:
        ValueError: a key is not among `known`, or, from the getters, a value is not of its kind.
    """

    def __init__(self, values: Mapping[str, Any], known: Collection[str], module: str) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        for key in self._values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
                raise ValueError(f"--network_args: {module} does not know {key!r}; {hint}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, low: int = 1) -> int | None:
        """A whole number, `low` or more."""
        return None if key not in self else _integer(key, self._values[key], low)

    def number(self, key: str, low: float = 0.0, below: float = float("inf")) -> float | None:
        """A number of at least `low` and less than `below`."""
        return None if key not in self else _number(key, self._values[key], low, below)

    def boolean(self, key: str) -> bool | None:
        """true, True, 1 or false, False, 0."""
        if key not in self:
            return None
        value = _BOOLEANS.get(str(self._values[key]))
        if value is None:
            raise ValueError(f"--network_args {key}={self._values[key]}: expected true or false")
        return value

    def integers(self, key: str, count: int) -> list[int] | None:
        """Exactly `count` whole numbers, separated by commas."""
        parts = self._parts(key, count)
        return None if parts is None else [_integer(key, part, 0) for part in parts]

    def numbers(self, key: str, count: int) -> list[float] | None:
        """Exactly `count` numbers, separated by commas."""
        parts = self._parts(key, count)
        return None if parts is None else [_number(key, part, 0.0, float("inf")) for part in parts]

    def text(self, key: str) -> str | None:
        """The value as it was given."""
        return None if key not in self else str(self._values[key])

    def _parts(self, key: str, count: int) -> list[str] | None:
        if key not in self:
            return None
        parts = str(self._values[key]).split(",")
        if len(parts) != count:
            raise ValueError(
                f"--network_args {key}: expected {count} numbers separated by commas, one for each block, "
                f"and got {len(parts)}"
            )
        return parts


def _integer(key: str, text: Any, low: int) -> int:
    try:
        value = int(str(text).strip())
    except ValueError:
        raise ValueError(f"--network_args {key}: {str(text).strip()!r} is not a whole number") from None
    if value < low:
        raise ValueError(f"--network_args {key}: {value} is less than {low}")
    return value


def _number(key: str, text: Any, low: float, below: float) -> float:
    try:
        value = float(str(text).strip())
    except ValueError:
        raise ValueError(f"--network_args {key}: {str(text).strip()!r} is not a number") from None
    if not low <= value < below:
        limits = f"at least {low:g}" + ("" if below == float("inf") else f" and less than {below:g}")
        raise ValueError(f"--network_args {key}: {value:g} must be {limits}")
    return value
