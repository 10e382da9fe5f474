"""Trains like train_network.py and has every rank write its own weights; started by several processes."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from library.files.weights import save_safetensors  # noqa: E402
from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from library.models.sd.architecture import StableDiffusion  # noqa: E402
from library.train.network_trainer import NetworkTrainer  # noqa: E402


class Ranks(NetworkTrainer):
    """Every rank leaves what it holds when the last update is done."""

    architecture = StableDiffusion

    def finish(self) -> None:
        """Write this rank's weights beside the result."""
        rank, output = os.environ.get("RANK", "0"), Path(self.settings.values()["output_dir"])
        save_safetensors(self.trained.network.state_dict_for_saving(), output / f"rank{rank}.safetensors", {})
        super().finish()


if __name__ == "__main__":
    sys.exit(Ranks(read_settings(TRAIN_NETWORK, "test")).run())
