"""What does a step of a model at full size make a GPU do, by format and recomputation? See bench.py.

Each row is a line of JSON, printed when it is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from full_counts import WHOLE, Counts, counts_of_step, uploaded_per_step
from library.memory.checkpointing import Recompute
from made_up_run import FAMILIES, RECOMPUTED, Variant

MIB, GIB, GB = 2**20, 2**30, 1e9


@dataclass(frozen=True)
class Reference:
    """The figures of sd-scripts: counted the same way, without content and with LoRA of rank 16 on the same layers."""

    steps: Mapping[tuple[str, Recompute], str] = field(default_factory=dict)
    blocks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """MiB that it keeps of a block without recomputation."""
    exchanged: Mapping[int, float] = field(default_factory=dict)
    """Swapped blocks -> GB that its block swap moves in a step, in both directions together, in bf16."""


REFERENCES = {
    "sd": Reference(steps={("bf16", Recompute.NOTHING): "1.8 TFLOP; 1.2 GiB kept"}),
    "sdxl": Reference(
        steps={
            ("bf16", Recompute.NOTHING): "18.9k kernels, LoRA 12.5k; 104 GB, LoRA 53.7; 15.0 TFLOP; 8.2 GiB kept",
            ("bf16", Recompute.ALL): "21.8 TFLOP; 0.57 GiB kept",
        }
    ),
    "flux": Reference(
        steps={
            ("bf16", Recompute.NOTHING): "172 TFLOP; 39.8 GiB kept",
            ("bf16", Recompute.ALL): "1087 GB, LoRA about 300; 247 TFLOP; 1.5 GiB kept",
            ("fp8_base", Recompute.NOTHING): "172 TFLOP; 63 GiB kept",
            ("fp8_base", Recompute.ALL): "1158 GB, LoRA about 300; 247 TFLOP",
            ("fp8_scaled", Recompute.ALL): "1277 GB, LoRA about 300; 247 TFLOP",
        },
        blocks={
            ("bf16", "double_blocks"): 789,
            ("bf16", "single_blocks"): 678,
            ("fp8_base", "double_blocks"): 1437,
            ("fp8_base", "single_blocks"): 948,
        },
        exchanged={35: 87.0},
    ),
}


def rows(name: str) -> Iterator[tuple[str, str, str]]:
    """What was counted, and the figure of sd-scripts beside it where there is one."""
    family, reference = FAMILIES[name], REFERENCES[name]
    for recompute in Recompute:
        for form in family.forms:
            found = counts_of_step(family, Variant(form, recompute=recompute))
            bare = counts_of_step(family, Variant(form, recompute=recompute), adapted=False)[WHOLE]
            share = {key: found[WHOLE][key] - bare[key] for key in bare}
            title = f"{form}, {RECOMPUTED[recompute]}"
            for part, counts in found.items():
                known = reference.blocks.get((form, part)) if recompute is Recompute.NOTHING else None
                there = reference.steps.get((form, recompute), "") if part == WHOLE else ""
                text = described(counts, share if part == WHOLE else None)
                yield f"{title}, {part.removesuffix('s')}", text, f"{known} MiB kept" if known else there
    for form in family.forms:
        for count in family.full.swaps[1:]:
            exchanged = f"{reference.exchanged[count]} GB" if form == "bf16" and count in reference.exchanged else ""
            sizes = [uploaded_per_step(family, Variant(form, count, cpu_modulation=hosts)) for hosts in (False, True)]
            text = f"{sizes[0] / GB:.1f} GB, with --cpu_modulation {sizes[1] / GB:.1f} GB"
            yield f"{form}, uploaded in a step, {count} blocks swapped", text, exchanged


def described(counts: Counts, share: Counts | None) -> str:
    """The counts of a whole step, and the share of the adapters; or those of one block of it."""
    kernels, moved = total(counts, "kernels"), total(counts, "elementwise_bytes") / GB
    kept = counts["bytes_kept_for_backward"]
    if share is None:
        return f"{kernels:,} kernels; {moved:.1f} GB; {kept / MIB:.0f} MiB kept"
    of_lora = f"LoRA {total(share, 'kernels'):,}", f"LoRA {total(share, 'elementwise_bytes') / GB:.1f}"
    products = f"{counts['flops'] / 1e12:.1f} TFLOP; {kept / GIB:.2f} GiB kept"
    return f"{kernels:,} kernels, {of_lora[0]}; {moved:.1f} GB, {of_lora[1]}; {products}"


def total(counts: Counts, what: str) -> int:
    """Forward and backward together."""
    return counts[f"{what}_forward"] + counts[f"{what}_backward"]


if __name__ == "__main__":
    for row in rows(sys.argv[1]):
        print(json.dumps(row), flush=True)
