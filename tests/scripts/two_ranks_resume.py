"""Trains to the end, then once more from a state in its middle; started by several processes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from library.models.sd.architecture import StableDiffusion  # noqa: E402
from library.train.network_trainer import NetworkTrainer  # noqa: E402


class Trainer(NetworkTrainer):
    """As train_network.py's."""

    architecture = StableDiffusion

    def start(self) -> None:
        """The end of a run would take the process group away, which the second run needs."""
        super().start()
        self.accelerator.end_training = self.accelerator.wait_for_everyone


def main() -> int:
    """The second run writes to the folder `resumed` in that of the first."""
    words = sys.argv[1:]
    whole = Trainer(read_settings(TRAIN_NETWORK, "test", argv=words))
    code = whole.run()
    output = Path(whole.settings.values()["output_dir"])
    resume = ["--output_dir", str(output / "resumed"), "--resume", str(output / "small-step00000002-state")]
    return code or Trainer(read_settings(TRAIN_NETWORK, "test", argv=[*words, *resume])).run()


if __name__ == "__main__":
    sys.exit(main())
