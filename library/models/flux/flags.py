"""What may be said about FLUX.1 and Chroma models."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.flags.declare import flag
from library.flags.flow import IDLE_WITH_FLOW, FlowFlags, WeightingFlags
from library.flags.run import LargeModelFlags
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE


@dataclass(frozen=True)
class FluxModelFlags:
    """FLUX.1 and Chroma"""

    model_type: str = flag(
        "flux", "what the model is: FLUX.1 (dev or schnell, which the file tells) or Chroma", choices=("flux", "chroma")
    )
    clip_l: str | None = flag(
        None, "text encoder CLIP-L, a .safetensors file or a folder of diffusers; Chroma has none", names="weights"
    )
    t5xxl: str | None = flag(
        None, "text encoder T5-XXL in fp16, bf16 or fp8, a .safetensors file or a folder of diffusers", names="weights"
    )
    ae: str | None = flag(None, "the autoencoder, a .safetensors file or a folder of diffusers", names="weights")
    t5xxl_max_token_length: int | None = flag(
        None,
        "tokens that T5-XXL reads of a caption; longer ones are cut (256 for schnell, 512 otherwise, unless given)",
        at_least=1,
    )
    apply_t5_attn_mask: bool = flag(
        False, "padding after the caption is not attended to, in T5-XXL and in the transformer; always so with Chroma"
    )
    controlnet_model_name_or_path: str | None = flag(
        None, "FLUX ControlNet that previews with --cn are made with, a .safetensors file", names="file"
    )


@dataclass(frozen=True)
class FluxTrainingFlags:
    """Training of FLUX.1 and Chroma"""

    guidance_scale: float = flag(
        3.5,
        "guidance that a distilled model (dev) is told while it learns; 1 trains without its push, "
        "schnell knows none, and with Chroma it is 0",
        at_least=0.0,
    )
    split_mode: bool = flag(False, "older way to say blocks_to_swap 18")


FLUX_TRAIN_NETWORK: tuple[type, ...] = (
    FluxModelFlags,
    *TRAIN_NETWORK,
    *WITH_TEXT_CACHE,
    FlowFlags,
    WeightingFlags,
    FluxTrainingFlags,
    LargeModelFlags,
)

FLUX_IDLE: Mapping[str, str] = {
    **IDLE_WITH_FLOW,
    "vae": "the autoencoder is the file of --ae",
    "max_token_length": "CLIP-L reads 77 tokens, and --t5xxl_max_token_length is for T5-XXL",
}
"""Flags of every trainer that do nothing with FLUX.1 and Chroma -> why."""
