"""What does a step of FLUX.1-dev make a GPU do, by format and recomputation? Prints rows as JSON; see bench.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flux_counts import FORMATS, GB, MIB, SWAPS, block_counts, step_counts, uploaded_per_step
from library.memory.checkpointing import Recompute

NAMES = {Recompute.NOTHING: "all kept", Recompute.ELEMENTWISE: "products kept", Recompute.ALL: "all recomputed"}
REFERENCE_KEPT = {
    ("bf16", "double"): 789,
    ("bf16", "single"): 678,
    ("fp8_base", "double"): 1437,
    ("fp8_base", "single"): 948,
}
"""MiB that sd-scripts keeps of a block without recomputation."""
REFERENCE_STEP = {"bf16": 1087, "fp8_base": 1087 + 71, "fp8_scaled": 1087 + 190}
"""GB of elementwise traffic of its step with full recomputation, about 300 of them for the LoRA."""
REFERENCE_FLOPS = {Recompute.NOTHING: 172, Recompute.ALL: 247}
"""TFLOP of its step."""
REFERENCE_EXCHANGE = {35: 87.0}
"""GB that its block swap moves in a step, in both directions together, in bf16."""


def rows() -> Iterator[tuple[str, str, str]]:
    """What was counted, and the figure of sd-scripts beside it where there is one."""
    for form in FORMATS:
        for kind in ("double", "single"):
            for recompute, name in NAMES.items():
                found = block_counts(kind, form, recompute)
                known = REFERENCE_KEPT.get((form, kind)) if recompute is Recompute.NOTHING else None
                text = f"{found.kept / MIB:.0f} MiB kept, {found.kernels} kernels, {found.elementwise / GB:.2f} GB"
                yield f"{form}, {kind} block, {name}", text, f"{known} MiB kept" if known else ""
    for form in FORMATS:
        for recompute, name in NAMES.items():
            found, bare = step_counts(form, recompute), step_counts(form, recompute, adapted=False)
            lora = (found.elementwise - bare.elementwise) / GB
            products = f"{found.flops / 1e12:.0f} TFLOP; {found.kept / 2**30:.1f} GiB kept"
            there = [f"{REFERENCE_STEP[form]} GB, LoRA about 300"] if recompute is Recompute.ALL else []
            there += [f"{REFERENCE_FLOPS[recompute]} TFLOP"] if recompute in REFERENCE_FLOPS else []
            text = f"{found.elementwise / GB:.0f} GB elementwise, of these LoRA {lora:.0f}; {products}"
            yield f"{form}, step, {name}", text, "; ".join(there)
    for form in FORMATS:
        for count in SWAPS:
            exchanged = f"{REFERENCE_EXCHANGE[count]} GB" if form == "bf16" and count in REFERENCE_EXCHANGE else ""
            size = f"{uploaded_per_step(form, count) / GB:.1f} GB"
            size += f", with --cpu_modulation {uploaded_per_step(form, count, cpu_modulation=True) / GB:.1f} GB"
            yield f"{form}, uploaded in a step, {count} blocks swapped", size, exchanged


if __name__ == "__main__":
    print(json.dumps(list(rows())))
