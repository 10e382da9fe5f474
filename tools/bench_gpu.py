"""How fast is a model on this GPU, in how much memory, and does it stay right? One row a process; see bench.py.

Without --variant it prints the names of the rows as JSON, with the number of one what was found for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu_run import endured, lasting_variants, measured, variants
from made_up_run import FAMILIES, MadeUpRun


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("gpu", "endurance"))
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--size", choices=("full", "small"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--variant", type=int)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu --size small tries the measurement out")
    family = FAMILIES[given.family]
    size, title = (family.full, family.title) if given.size == "full" else (family.small, f"small {family.title}")
    if given.what == "endurance":
        choices = lasting_variants(family, size)
    else:
        choices = list(variants(family, size, "inductor" if given.device == "cuda" else "eager"))
    if given.variant is None:
        end = f", {given.steps} steps" if given.what == "endurance" else ""
        print(json.dumps([f"{title}, {variant}{end}" for variant in choices]))
        return 0
    if given.what == "endurance":  # before the first tensor is on the device
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    run = MadeUpRun(family, size, choices[given.variant], device)
    print(endured(run, given.steps) if given.what == "endurance" else measured(run, given.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
