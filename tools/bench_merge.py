"""What does merging a LoRA into a FLUX.1 file cost? Prints seconds and gigabytes as JSON; see bench.py."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from bench_memory import peak_memory
from header_only import write_random_bytes
from library.files.safetensors_header import header
from library.files.weights import open_weights
from networks.core.lora_file import LowRankPair
from networks.core.model_merge import Addition, plan_merge, write_merged

HIDDEN, MLP, RANK = 3072, 12288, 16
DOUBLE = {"attn.qkv": (3 * HIDDEN, HIDDEN), "attn.proj": (HIDDEN, HIDDEN), "mlp.0": (MLP, HIDDEN),
          "mlp.2": (HIDDEN, MLP), "mod.lin": (6 * HIDDEN, HIDDEN)}  # fmt: skip
SINGLE = {
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
}
DOUBLES, SINGLES = 2, 3
"""Blocks of the file, of 19 and 38: the layers are of full size, and memory does not depend on how many there are."""


def main() -> int:
    """Write a model in bf16, merge a LoRA on all its layers, print what that took."""
    layers = {
        f"double_blocks.{n}.{stream}_{path}": shape
        for n in range(DOUBLES)
        for stream in ("img", "txt")
        for path, shape in DOUBLE.items()
    }
    layers |= {f"single_blocks.{n}.{path}": shape for n in range(SINGLES) for path, shape in SINGLE.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        shapes = {
            f"{path}.weight": torch.empty(shape, dtype=torch.bfloat16, device="meta") for path, shape in layers.items()
        }
        size = sum(shape.nbytes for shape in shapes.values())
        write_random_bytes(model, header(shapes, {}), size)
        print(json.dumps({"largest_gigabytes": max(s.nbytes for s in shapes.values()) / 1e9} | measure(model, layers)))
    return 0


def measure(model: Path, layers: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Seconds and the growth of the process's largest memory, imports left out."""
    before, started, cpu_started = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    loras = {
        f"lora_unet_{path.replace('.', '_')}": [
            Addition(LowRankPair(torch.zeros(RANK, columns), torch.zeros(rows, RANK), 1.0), 1.0, "lora")
        ]
        for path, (rows, columns) in layers.items()
    }
    with open_weights(model) as file:
        plan, unmatched = plan_merge(file, "lora_unet", loras, torch.bfloat16)
        assert not unmatched and len(plan.additions) == len(layers)
        write_merged(file, plan, model.with_name("merged.safetensors"), torch.float32, "cpu", {})
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "gigabytes": model.stat().st_size / 1e9,
        "peak_gigabytes": (peak_memory() - before) / 1e9,
    }


if __name__ == "__main__":
    sys.exit(main())
