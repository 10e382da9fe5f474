"""What does a training step of the small model cost? Prints CPU milliseconds as JSON; see bench.py."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo_folder import write_demo
from small_run import small_run

WARM_UP, MEASURED = 10, 60


def main() -> int:
    """Train for a while and print the median and the best step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(write_demo(Path(folder) / "demo"), Path(folder) / "output")
        batches = run.batches()
        with run.progress.until_closed():
            times = [run.timed_step(batches) for _ in range(WARM_UP + MEASURED)][WARM_UP:]
        found = {
            "layers": len(run.trained.network.state_dict()) // 3,  # down, up and alpha
            "median_ms": 1000 * statistics.median(whole for whole, _ in times),
            "best_ms": 1000 * min(whole for whole, _ in times),
            "around_ms": 1000 * statistics.median(around for _, around in times),
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
