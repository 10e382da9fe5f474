"""What are the tools that fill caches told about the family of the model, besides all flags of its training?"""

from dataclasses import dataclass

from library.flags.cache_tools import LATENTS_READ, TEXT_READ, TRAINING, CacheTool, CastFlags
from library.flags.declare import flag
from library.flags.rules.rule import Consequence, Rule, Rules
from library.models.flux.flags import FLUX_TRAIN_NETWORK
from library.models.sdxl.flags import SDXL_IDLE, SDXL_TRAIN_NETWORK


@dataclass(frozen=True)
class FamilyFlags:
    """Which family it is"""

    sdxl: bool = flag(False, "the model is SDXL")
    flux: bool = flag(False, "the model is FLUX.1, or Chroma with --model_type chroma")


OF_FLUX = "is for FLUX.1 and Chroma: add --flux"
IDLE = "has no effect with --flux"
RULES = Rules(
    mistakes=(
        Rule("two families", lambda flux, sdxl: flux and sdxl, "--flux and --sdxl are two families; leave one out"),
        Rule(
            "2.x with XL",
            lambda sdxl, v2: sdxl and v2,
            "--v2 is for Stable Diffusion 2.x; leave it out for SDXL, or leave out --sdxl",
        ),
        Rule("CLIP-L without --flux", lambda flux, clip_l: not flux and bool(clip_l), f"--clip_l {OF_FLUX}"),
        Rule("T5-XXL without --flux", lambda flux, t5xxl: not flux and bool(t5xxl), f"--t5xxl {OF_FLUX}"),
        Rule("autoencoder without --flux", lambda flux, ae: not flux and bool(ae), f"--ae {OF_FLUX}"),
        Rule(
            "weighted captions of FLUX.1",
            lambda flux, weighted_captions: flux and weighted_captions,
            "--weighted_captions: T5-XXL has no weights of words; leave it out",
        ),
    ),
    doubts=(
        Rule(
            "clip_skip with XL",
            lambda sdxl, clip_skip: sdxl and bool(clip_skip),
            f"--clip_skip has no effect with --sdxl: {SDXL_IDLE['clip_skip']}",
        ),
        Rule("2.x with FLUX.1", lambda flux, v2: flux and v2, f"--v2 {IDLE}"),
        Rule(
            "--vae with FLUX.1", lambda flux, vae: flux and bool(vae), f"--vae {IDLE}: the autoencoder is that of --ae"
        ),
        Rule("clip_skip with FLUX.1", lambda flux, clip_skip: flux and bool(clip_skip), f"--clip_skip {IDLE}"),
        Rule(
            "max_token_length with FLUX.1",
            lambda flux, max_token_length: flux and bool(max_token_length),
            f"--max_token_length {IDLE}: CLIP-L reads 77 tokens, and --t5xxl_max_token_length is for T5-XXL",
        ),
    ),
    consequences=(
        Consequence(
            "Chroma masks its text",
            lambda flux, model_type, apply_t5_attn_mask: flux and model_type == "chroma" and not apply_t5_attn_mask,
            "apply_t5_attn_mask",
            True,
            "--model_type=chroma switches --apply_t5_attn_mask on: Chroma was made with it",
        ),
    ),
)
GROUPS = tuple(dict.fromkeys((*TRAINING, FamilyFlags, *FLUX_TRAIN_NETWORK, *SDXL_TRAIN_NETWORK)))
"""All that a training of any of the families is told."""
FAMILY = {"sdxl", "flux", "model_type"}

CACHE_LATENTS = CacheTool(
    GROUPS,
    read=LATENTS_READ | FAMILY | {"ae"},
    why="cached latents do not depend on this",
    defaults={"cache_latents": True, "cache_latents_to_disk": True},
    rules=RULES,
)
CACHE_TEXT = CacheTool(
    (*GROUPS, CastFlags),
    read=TEXT_READ | FAMILY | {"clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask"},
    why="cached text does not depend on this",
    defaults={"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
    rules=RULES,
)
