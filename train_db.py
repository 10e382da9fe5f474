"""Train a whole Stable Diffusion 1.x or 2.x model, U-Net and text encoder (DreamBooth)."""

import sys

from library.flags.console import set_up_logging
from library.flags.dreambooth import DB_ABSENT, DB_CHOICES, DB_DEFAULTS, DB_IDLE, DB_RULES, TRAIN_DB
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(
        TRAIN_DB, __doc__, DB_DEFAULTS, idle=DB_IDLE, rules=DB_RULES, absent=DB_ABSENT, choices=DB_CHOICES
    )
    set_up_logging(settings[LoggingFlags], settings.warnings)

from library.models.sd.architecture import StableDiffusion
from library.train.dreambooth_trainer import DreamBoothTrainer


class StableDiffusionTrainer(DreamBoothTrainer):
    """The trainer of whole models of Stable Diffusion 1.x and 2.x."""

    architecture = StableDiffusion


if __name__ == "__main__":
    sys.exit(StableDiffusionTrainer(settings).run())
