"""What does a training step of the small model make the machine do? Prints counts as JSON; see bench.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_folder import write_demo
from small_run import small_run


def main() -> int:
    """Count one step and print what was found."""
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(write_demo(Path(folder) / "demo"), Path(folder) / "output")
        print(json.dumps(run.count()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
