"""Writes the demo folder that tools/quickstart.py trains on: `python tools/demo_files.py [folder]`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_folder import write_demo


def main(arguments: list[str]) -> int:
    """Write the folder (default `demo`) and print what is in it."""
    demo = write_demo(Path(arguments[0] if arguments else "demo"))
    pictures = len(list(demo.pictures.glob("*.png")))
    print(f"{demo.checkpoint}: {demo.checkpoint.stat().st_size / 1e6:.1f} MB")
    print(f"{demo.pictures}: {pictures} pictures with captions")
    print(f"{demo.tokenizers}, {demo.dataset}, {demo.prompts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
