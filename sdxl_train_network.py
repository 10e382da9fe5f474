"""Train a LoRA, or another network, on Stable Diffusion XL."""

import sys

from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES, SDXL_TRAIN_NETWORK

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(SDXL_TRAIN_NETWORK, description=__doc__, idle=SDXL_IDLE, rules=SDXL_RULES)
    set_up_logging(settings[LoggingFlags], settings.warnings)

from library.models.sdxl.architecture import Sdxl
from library.train.network_trainer import NetworkTrainer


class SdxlNetworkTrainer(NetworkTrainer):
    """The network trainer for Stable Diffusion XL."""

    architecture = Sdxl


if __name__ == "__main__":
    sys.exit(SdxlNetworkTrainer(settings).run())
