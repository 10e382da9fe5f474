"""What may be said about Stable Diffusion XL models, and what does not go together."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.flags.declare import flag
from library.flags.rules.rule import Consequence, Rule, Rules
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE


@dataclass(frozen=True)
class EncoderRateFlags:
    """Text encoders of SDXL"""

    text_encoder_lr1: float | None = flag(
        None, "learning rate of CLIP-L: the first of two values of text_encoder_lr", at_least=0
    )
    text_encoder_lr2: float | None = flag(
        None, "learning rate of OpenCLIP bigG: the second of two values of text_encoder_lr", at_least=0
    )


SDXL_TRAIN_NETWORK: tuple[type, ...] = (*TRAIN_NETWORK, *WITH_TEXT_CACHE, EncoderRateFlags)

SDXL_IDLE: Mapping[str, str] = {
    "clip_skip": "Stable Diffusion XL reads both of its text encoders before their last layer",
}
"""Flags of every trainer that do nothing with Stable Diffusion XL -> why."""


def _encoder_rates(
    text_encoder_lr1: float | None, text_encoder_lr2: float | None, learning_rate: float
) -> tuple[float, ...]:
    return tuple(learning_rate if rate is None else rate for rate in (text_encoder_lr1, text_encoder_lr2))


SDXL_RULES = Rules(
    mistakes=(
        Rule(
            "rates of text encoders said twice",
            lambda text_encoder_lr, text_encoder_lr1, text_encoder_lr2, learning_rate: (
                (text_encoder_lr1 is not None or text_encoder_lr2 is not None)
                and text_encoder_lr != _encoder_rates(text_encoder_lr1, text_encoder_lr2, learning_rate)
            ),
            "--text_encoder_lr and --text_encoder_lr1, --text_encoder_lr2 say the same thing differently; "
            "keep one form: --text_encoder_lr 1e-5 2e-5 is --text_encoder_lr1 1e-5 --text_encoder_lr2 2e-5",
        ),
        Rule(
            "2.x with XL",
            lambda v2: v2,
            "--v2 is for Stable Diffusion 2.x; leave it out for SDXL, or use train_network.py",
        ),
        Rule(
            "cached text of trained encoders",
            lambda cache_text_encoder_outputs, network_train_unet_only: (
                cache_text_encoder_outputs and not network_train_unet_only
            ),
            "--cache_text_encoder_outputs needs --network_train_unet_only: "
            "what a trained text encoder says changes at every step",
        ),
    ),
    doubts=(
        Rule(
            "velocity with XL",
            lambda v_parameterization: v_parameterization,
            "--v_parameterization is unusual for SDXL: published base models predict noise",
        ),
    ),
    consequences=(
        Consequence(
            "a rate for each text encoder",
            lambda text_encoder_lr, text_encoder_lr1, text_encoder_lr2: (
                text_encoder_lr is None and (text_encoder_lr1 is not None or text_encoder_lr2 is not None)
            ),
            "text_encoder_lr",
            _encoder_rates,
            "--text_encoder_lr1 is the learning rate of CLIP-L and --text_encoder_lr2 that of OpenCLIP bigG; "
            "one that is not given is --learning_rate",
        ),
    ),
)
