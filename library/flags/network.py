"""Which network is trained on top of the base model."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.flags.declare import flag, none_for_zero
from library.flags.optimizer import pairs

FLAG_OF: Mapping[str, str] = {
    "network_dim": "network_dim",
    "network_alpha": "network_alpha",
    "neuron_dropout": "network_dropout",
}
"""Argument of `create_network` -> the flag that it is taken from."""
SET_BY_RUN = frozenset(["multiplier", "vae", "text_encoder", "unet", "file", "weights_sd", "for_inference"])


def network_pairs(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Arguments of the form key=value; ValueError for a key that the trainer itself says."""
    for pair in pairs(values) or ():
        key, _, value = pair.partition("=")
        if key in FLAG_OF:
            raise ValueError(f"{key} has a flag: leave it out here and give --{FLAG_OF[key]}={value}")
        if key in SET_BY_RUN:
            raise ValueError(f"{key} is set by the run: leave it out")
    return values


@dataclass(frozen=True)
class NetworkFlags:
    """Network"""

    network_weights: str | None = flag(None, "network file to start from", names="file")
    network_module: str | None = flag(None, "module that makes the network: networks.lora, lycoris.kohya")
    network_dim: int | None = flag(None, "rank (4 unless given)", at_least=1)
    network_alpha: float = flag(1, "scale: the network's effect is times alpha / rank")
    network_dropout: float | None = flag(
        None, "probability of dropping each value between down and up", at_least=0, at_most=1
    )
    network_args: tuple[str, ...] | None = flag(
        None, "key=value for the network: conv_dim=4 conv_alpha=1", parse=network_pairs
    )
    network_train_unet_only: bool = flag(False, "train the U-Net's part only")
    network_train_text_encoder_only: bool = flag(False, "train the text encoders' part only")
    dim_from_weights: bool = flag(False, "take ranks from network_weights")
    scale_weight_norms: float | None = flag(
        None,
        "after each step, scale layers down whose weight is longer than this (1 is usual); 0 is off",
        parse=none_for_zero,
        at_least=0,
    )
    base_weights: tuple[str, ...] | None = flag(
        None, "network files merged into the base model before training", names="file"
    )
    base_weights_multiplier: tuple[float, ...] | None = flag(None, "strength of each of base_weights (1 unless given)")
