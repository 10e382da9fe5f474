"""Train a LoRA, or another network, on Stable Diffusion 1.x or 2.x."""

import sys

from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(TRAIN_NETWORK, description=__doc__)
    set_up_logging(settings[LoggingFlags], settings.warnings)

from library.models.sd.architecture import StableDiffusion
from library.train.network_trainer import NetworkTrainer


class StableDiffusionNetworkTrainer(NetworkTrainer):
    """The network trainer for Stable Diffusion 1.x and 2.x."""

    architecture = StableDiffusion


if __name__ == "__main__":
    sys.exit(StableDiffusionNetworkTrainer(settings).run())
