"""The recorded flags of published scripts, and ours told in the same words."""

from __future__ import annotations

import json
from dataclasses import Field
from pathlib import Path
from typing import Any

from library.flags.declare import is_switch, takes_many, value_type

MORE_CHOICES = {"max_token_length": [75]}
"""75 is what None means; graphical front ends write it down."""


def recorded_flags(facts: Path, script: str) -> dict[str, dict[str, Any]]:
    """Name -> how `script` was seen to declare it."""
    rows = json.loads((facts / "cli" / f"{script}.json").read_text(encoding="utf-8"))["flags"]
    return {row["dest"]: row for row in rows}


def signature(declared: Field[Any], default: Any) -> dict[str, Any]:
    """What argparse is told of a flag of ours."""
    kind = value_type(declared)
    choices = [c for c in declared.metadata["choices"] or () if c not in MORE_CHOICES.get(declared.name, ())]
    return {
        "flags": [f"--{declared.name}"],
        "kind": "store_true" if is_switch(declared) else "store",
        "type": kind and kind.__name__,
        "nargs": "*" if takes_many(declared) else None,
        "choices": choices or None,
        "default": default,
    }
