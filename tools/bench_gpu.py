"""How fast is FLUX.1-dev on this GPU, and in how much memory? Prints rows as JSON; see bench.py.

Rank 16 on every linear layer of the blocks, 1024 x 1024, batch size 1. Variants that do not fit say so. Each variant
has a process of its own, so that none sees another's memory.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu_run import FULL_SIZE, SCALINGS, Variant, run
from library.memory.checkpointing import Recompute

PATCHES = (64, 64)
TEXT_TOKENS = 512
STEPS = 10
SWAPS = (0, 9, 18, 28, 35)
RECOMPUTE = (Recompute.ALL, Recompute.ELEMENTWISE)


def main() -> int:
    """Without arguments all variants; with the number of one, that one."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    variants = [
        Variant(*choice)
        for choice in itertools.product(SCALINGS, SWAPS, RECOMPUTE, (False, True))
        # A compiled block cannot look its weights up again, so swapped ones are recomputed in full.
        if not (choice[1] and choice[2] is not Recompute.ALL and choice[3])
    ]
    if len(sys.argv) > 1:
        found = run(FULL_SIZE, variants[int(sys.argv[1])], torch.device("cuda", 0), PATCHES, TEXT_TOKENS, STEPS)
        print(json.dumps(astuple(found)))
        return 0
    print(json.dumps([[f"FLUX.1-dev, {variant}", measured(index), ""] for index, variant in enumerate(variants)]))
    return 0


def measured(index: int) -> str:
    """One variant in words."""
    command = [sys.executable, __file__, str(index)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return "does not fit" if "OutOfMemory" in last else f"failed: {last}"
    seconds, device, host, waiting, _ = json.loads(done.stdout.splitlines()[-1])
    return (
        f"{seconds:.2f} s, {device / 1e9:.1f} GB of the device, {host / 1e9:.1f} GB of the host, {waiting:.1%} waiting"
    )


if __name__ == "__main__":
    sys.exit(main())
