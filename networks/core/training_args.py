"""What --network_args say about how adapters are trained, in every family alike."""

from __future__ import annotations

from networks.core.adapter import Dropout
from networks.core.options import NetworkArgs
from networks.core.parameter_groups import LoraPlus
from networks.core.perturbation import Ggpo

TRAINING_ARGS = (
    "dropout",
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)
GGPO_ARGS = ("ggpo_sigma", "ggpo_beta")


def read_dropout(args: NetworkArgs, neuron: float | None) -> Dropout:
    """What is left out at random; `neuron` is --network_dropout.

    Raises:
        ValueError: a probability is not one.
    """
    if neuron is None:
        neuron = args.number("dropout", below=1.0)
    elif not 0 <= neuron < 1:
        raise ValueError(f"--network_dropout {neuron}: expected at least 0 and less than 1")
    rank, module = args.number("rank_dropout", below=1.0), args.number("module_dropout", below=1.0)
    return Dropout(neuron or 0.0, rank or 0.0, module or 0.0)


def read_lora_plus(args: NetworkArgs) -> LoraPlus:
    """How much faster the second matrix learns.

    Raises:
        ValueError: a ratio is not a number above 0.
    """
    both, unet, text_encoder = (
        args.number(key, low=1e-6)
        for key in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    )
    return LoraPlus(both if text_encoder is None else text_encoder, both if unet is None else unet)


def read_ggpo(args: NetworkArgs) -> Ggpo | None:
    """How far weights are nudged; None for not at all.

    Raises:
        ValueError: one of the two is given alone, or is no number.
    """
    sigma, beta = (args.number(key) for key in GGPO_ARGS)
    if sigma is None and beta is None:
        return None
    if sigma is None or beta is None:
        alone, other = GGPO_ARGS if beta is None else reversed(GGPO_ARGS)
        raise ValueError(f"--network_args {alone} needs {other}")
    return Ggpo(sigma, beta)
