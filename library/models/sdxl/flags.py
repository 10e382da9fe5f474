"""What may be said about Stable Diffusion XL models, and what does not go together."""

from collections.abc import Mapping

from library.flags.rules.rule import Rule, Rules
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE

SDXL_TRAIN_NETWORK: tuple[type, ...] = (*TRAIN_NETWORK, *WITH_TEXT_CACHE)

SDXL_IDLE: Mapping[str, str] = {
    "clip_skip": "Stable Diffusion XL reads both of its text encoders before their last layer",
}
"""Flags of every trainer that do nothing with Stable Diffusion XL -> why."""

SDXL_RULES = Rules(
    mistakes=(
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
)
