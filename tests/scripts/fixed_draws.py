"""Trains with draws that belong to the images; started by several processes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from tests.clients.fixed_draws import FixedDraws  # noqa: E402

if __name__ == "__main__":
    sys.exit(FixedDraws(read_settings(TRAIN_NETWORK, "test")).run())
