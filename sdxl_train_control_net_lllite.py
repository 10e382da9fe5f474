"""Train a ControlNet-LLLite, which makes Stable Diffusion XL follow a picture."""

import sys

from library.flags.console import set_up_logging
from library.flags.lllite import LLLITE_ABSENT, LLLITE_IDLE, LLLITE_RULES, TRAIN_LLLITE, LlliteFlags
from library.flags.output import LoggingFlags
from library.flags.settings import read_settings
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES

if __name__ == "__main__":
    # Above the heavy imports: --help and a mistake in the settings cost no import of torch.
    settings = read_settings(
        TRAIN_LLLITE,
        __doc__,
        idle={**SDXL_IDLE, **LLLITE_IDLE},
        rules=SDXL_RULES + LLLITE_RULES,
        absent=LLLITE_ABSENT,
    )
    set_up_logging(settings[LoggingFlags], settings.warnings)

from torch import nn

from library.models.sdxl.architecture import Sdxl
from library.train.control_trainer import ControlTrainer
from networks.control_net_lllite import ControlNetLLLite, create_network


class SdxlControlTrainer(ControlTrainer):
    """The trainer of ControlNet-LLLite for Stable Diffusion XL."""

    architecture = Sdxl
    kind = "control-net-lllite"

    def make_network(self, denoiser: nn.Module, flags: LlliteFlags) -> ControlNetLLLite:
        """A new network, or one with the sizes and weights of --network_weights."""
        return create_network(
            denoiser, flags.network_weights, flags.cond_emb_dim, flags.network_dim, flags.network_dropout
        )


if __name__ == "__main__":
    sys.exit(SdxlControlTrainer(settings).run())
