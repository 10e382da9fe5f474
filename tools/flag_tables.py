"""The tables of flags on a script's page, made from the declarations: `python tools/flag_tables.py --write`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.flags.declare import is_switch, meaning, takes_many, title, value_type, without_effect
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK
from library.models.flux.picture_flags import FLUX_PICTURES

ROOT = Path(__file__).resolve().parents[1]
PAGES: dict[str, tuple[type, ...]] = {
    "docs/train_network.md": TRAIN_NETWORK,
    "docs/flux_train_network.md": FLUX_TRAIN_NETWORK,
    "docs/flux_minimal_inference.md": FLUX_PICTURES,
}
IDLE: dict[str, Mapping[str, str]] = {"docs/flux_train_network.md": FLUX_IDLE}
"""Page -> flags that the script takes and does not read, and why."""
START, END = "<!-- flags: made by tools/flag_tables.py -->", "<!-- end of flags -->"
WORDS = {"int": "integer", "float": "number", "str": "text", "Path": "text", "int_or_float": "number or %"}


def main() -> int:
    """Print the tables of every page, or write them into the pages."""
    parser = argparse.ArgumentParser(description="Tables of flags for the pages in docs/.")
    parser.add_argument("--write", action="store_true", help="bring the pages up to date instead of printing")
    write = parser.parse_args().write
    for name, groups in PAGES.items():
        path = ROOT / name
        if write:
            page = with_tables(path.read_text(encoding="utf-8"), groups, IDLE.get(name))
            path.write_text(page, encoding="utf-8", newline="\n")
        else:
            print(tables(groups, IDLE.get(name)))
    return 0


def with_tables(page: str, groups: Sequence[type], idle: Mapping[str, str] | None = None) -> str:
    """The text of `page` with the tables of `groups` between its two marks."""
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no lines {START} and {END} for the tables to stand between")
    return f"{before}{START}\n\n{tables(groups, idle)}\n{END}{after}"


def tables(groups: Sequence[type], idle: Mapping[str, str] | None = None) -> str:
    """A heading and a table for each group that has a usable flag, then a list of the flags that are refused.

    `idle` names flags without an effect in this script, and says why.
    """
    why = idle or {}
    parts = []
    for group in groups:
        declared_here = [without_effect(f, why[f.name]) if f.name in why else f for f in fields(group)]
        usable = [declared for declared in declared_here if not declared.metadata["unavailable"]]
        if usable:
            rows = "".join(row(declared) for declared in usable)
            parts.append(f"### {title(group)}\n\n| flag | value | default | meaning |\n|---|---|---|---|\n{rows}")
    return "\n".join([*parts, refused(groups)])


def row(declared: Field[Any]) -> str:
    """One line of a table."""
    default = "" if declared.default in (None, "", ()) or is_switch(declared) else f"`{declared.default}`"
    return f"| `--{declared.name}` | {value(declared)} | {default} | {escaped(meaning(declared, None))} |\n"


def value(declared: Field[Any]) -> str:
    """What may stand behind a flag."""
    if is_switch(declared):
        return "switch"
    if declared.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in declared.metadata["choices"] if choice is not None)
    word = WORDS[getattr(value_type(declared), "__name__", "")]
    return f"{word} ..." if takes_many(declared) else word


def refused(groups: Sequence[type]) -> str:
    """The flags that are known but not available yet, under what they are for."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for declared in fields(group):
            if declared.metadata["unavailable"]:
                found.setdefault(declared.metadata["unavailable"], []).append(f"`--{declared.name}`")
    rows = "".join(f"| {reason} | {' '.join(names)} |\n" for reason, names in found.items())
    return f"### Not available yet\n\n| for | flags |\n|---|---|\n{rows}" if rows else ""


def escaped(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
