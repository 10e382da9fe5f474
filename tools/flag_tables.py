"""The tables of flags on a script's page, made from the declarations: `python tools/flag_tables.py --write`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.flags.declare import is_switch, meaning, script_flags, takes_many, title, value_type, with_default
from library.flags.dreambooth import DB_ABSENT, DB_CHOICES, DB_DEFAULTS, DB_IDLE, TRAIN_DB
from library.flags.lllite import LLLITE_ABSENT, LLLITE_IDLE, TRAIN_LLLITE
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK
from library.models.flux.picture_flags import FLUX_PICTURES
from library.models.sdxl.flags import SDXL_IDLE, SDXL_TRAIN_NETWORK

ROOT = Path(__file__).resolve().parents[1]
PAGES: dict[str, tuple[type, ...]] = {
    "docs/train_network.md": TRAIN_NETWORK,
    "docs/flux_train_network.md": FLUX_TRAIN_NETWORK,
    "docs/sdxl_train_network.md": SDXL_TRAIN_NETWORK,
    "docs/flux_minimal_inference.md": FLUX_PICTURES,
    "docs/train_db.md": TRAIN_DB,
    "docs/sdxl_train_control_net_lllite.md": TRAIN_LLLITE,
}
IDLE: dict[str, Mapping[str, str]] = {
    "docs/flux_train_network.md": FLUX_IDLE,
    "docs/sdxl_train_network.md": SDXL_IDLE,
    "docs/train_db.md": DB_IDLE,
    "docs/sdxl_train_control_net_lllite.md": {**SDXL_IDLE, **LLLITE_IDLE},
}
"""Page -> flags that the script takes and does not read, and why."""
ABSENT: dict[str, Mapping[str, str]] = {
    "docs/train_db.md": DB_ABSENT,
    "docs/sdxl_train_control_net_lllite.md": LLLITE_ABSENT,
}
"""Page -> flags of its groups that the script does not take."""
CHOICES: dict[str, Mapping[str, tuple[Any, ...]]] = {"docs/train_db.md": DB_CHOICES}
"""Page -> flags with other values than elsewhere."""
DEFAULTS: dict[str, Mapping[str, Any]] = {"docs/train_db.md": DB_DEFAULTS}
"""Page -> flags with another default than elsewhere."""
START, END = "<!-- flags: made by tools/flag_tables.py -->", "<!-- end of flags -->"
WORDS = {"int": "integer", "float": "number", "str": "text", "Path": "text", "int_or_float": "number or %"}


def main() -> int:
    """Print the tables of every page, or write them into the pages."""
    parser = argparse.ArgumentParser(description="Tables of flags for the pages in docs/.")
    parser.add_argument("--write", action="store_true", help="bring the pages up to date instead of printing")
    write = parser.parse_args().write
    for name in PAGES:
        path = ROOT / name
        if write:
            path.write_text(with_tables(path.read_text(encoding="utf-8"), name), encoding="utf-8", newline="\n")
        else:
            print(tables_of(name))
    return 0


def with_tables(page: str, name: str) -> str:
    """The text of `page`, which is called `name`, with the tables of its script between its two marks."""
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no lines {START} and {END} for the tables to stand between")
    return f"{before}{START}\n\n{tables_of(name)}\n{END}{after}"


def tables_of(name: str) -> str:
    """The tables of the script of a page."""
    flags = script_flags(PAGES[name], IDLE.get(name, {}), ABSENT.get(name, {}), CHOICES.get(name, {}))
    flags |= {flag: with_default(flags[flag], default) for flag, default in DEFAULTS.get(name, {}).items()}
    return tables(PAGES[name], flags)


def tables(groups: Sequence[type], flags: Mapping[str, Field[Any]]) -> str:
    """A heading and a table for each group that has a usable flag, then a list of those of `flags` that are refused."""
    parts = []
    for group in groups:
        declared_here = [flags[own.name] for own in fields(group) if own.name in flags]
        usable = [declared for declared in declared_here if not declared.metadata["unavailable"]]
        if usable:
            rows = "".join(row(declared) for declared in usable)
            parts.append(f"### {title(group)}\n\n| flag | value | default | meaning |\n|---|---|---|---|\n{rows}")
    return "\n".join([*parts, refused(flags)])


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


def refused(flags: Mapping[str, Field[Any]]) -> str:
    """The flags that are known but not available yet, under what they are for."""
    found: dict[str, list[str]] = {}
    for declared in flags.values():
        if declared.metadata["unavailable"]:
            found.setdefault(declared.metadata["unavailable"], []).append(f"`--{declared.name}`")
    rows = "".join(f"| {reason} | {' '.join(names)} |\n" for reason, names in found.items())
    return f"### Not available yet\n\n| for | flags |\n|---|---|\n{rows}" if rows else ""


def escaped(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
