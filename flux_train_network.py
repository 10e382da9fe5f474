"""Train a LoRA, or another network, on FLUX.1 or Chroma."""

import sys

from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK
from library.models.flux.rules import FLUX_RULES

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(FLUX_TRAIN_NETWORK, description=__doc__, idle=FLUX_IDLE, rules=FLUX_RULES)
    set_up_logging(settings[LoggingFlags], settings.warnings)

from library.models.flux.architecture import Flux
from library.train.network_trainer import NetworkTrainer


class FluxNetworkTrainer(NetworkTrainer):
    """The network trainer for FLUX.1 and Chroma."""

    architecture = Flux


if __name__ == "__main__":
    sys.exit(FluxNetworkTrainer(settings).run())
