"""Do the flags of SDXL have the published names?"""

from __future__ import annotations

import json
from pathlib import Path

from library.flags.declare import declared_flags, is_switch, takes_many, value_type
from library.flags.trainers import TRAIN_NETWORK
from library.models.sdxl.flags import SDXL_TRAIN_NETWORK


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    rows = json.loads((facts / "cli" / "sdxl_train_network.json").read_text(encoding="utf-8"))["flags"]
    flags, shared = declared_flags(SDXL_TRAIN_NETWORK), declared_flags(TRAIN_NETWORK)
    own = [row for row in rows if row["dest"] not in shared]
    assert not {row["dest"] for row in rows} - flags.keys() and len(own) == 3
    for row in own:
        declared = flags[row["dest"]]
        kind = value_type(declared)
        ours = {
            "flags": [f"--{declared.name}"],
            "kind": "store_true" if is_switch(declared) else "store",
            "type": kind and kind.__name__,
            "nargs": "*" if takes_many(declared) else None,
            "choices": list(declared.metadata["choices"] or ()) or None,
            "default": declared.default,
        }
        assert ours == {key: row.get(key) for key in ours}
