"""Which settings of FLUX.1 and Chroma do not go together, and which follow from others."""

from collections.abc import Sequence

from library.flags.rules.memory import LARGE_MODELS
from library.flags.rules.rule import Consequence, Rule, Rules


def trains_t5(network_args: Sequence[str] | None) -> bool:
    """Whether `--network_args` say train_t5xxl=True."""
    return any(pair.partition("=")[::2] in _TRAINS_T5 for pair in network_args or ())


_TRAINS_T5 = [("train_t5xxl", value) for value in ("True", "true", "1")]

FLUX_RULES = LARGE_MODELS + Rules(
    mistakes=(
        Rule(
            "T5-XXL trained and cached",
            lambda network_args, cache_text_encoder_outputs: cache_text_encoder_outputs and trains_t5(network_args),
            "--network_args train_t5xxl=True trains T5-XXL, whose answers --cache_text_encoder_outputs keeps: "
            "leave one out",
        ),
        Rule(
            "FLUX.1 without CLIP-L",
            lambda model_type, clip_l: model_type == "flux" and not clip_l,
            "--clip_l is missing: name the file of the text encoder CLIP-L (FLUX.1 needs it, Chroma does not)",
        ),
        Rule("no T5-XXL", lambda t5xxl: not t5xxl, "--t5xxl is missing: name the file of the text encoder T5-XXL"),
        Rule("no autoencoder", lambda ae: not ae, "--ae is missing: name the file of the autoencoder"),
        Rule(
            "a ControlNet for Chroma",
            lambda model_type, controlnet_model_name_or_path: (
                model_type == "chroma" and bool(controlnet_model_name_or_path)
            ),
            "--controlnet_model_name_or_path is for FLUX.1: its ControlNets read CLIP-L, which Chroma does not have",
        ),
        Rule(
            "weighted captions",
            lambda weighted_captions: weighted_captions,
            "--weighted_captions: T5-XXL has no weights of words; leave it out",
        ),
    ),
    doubts=(
        Rule(
            "CLIP-L for Chroma",
            lambda model_type, clip_l: model_type == "chroma" and bool(clip_l),
            "--clip_l has no effect with --model_type=chroma, which has one text encoder, T5-XXL",
        ),
    ),
    consequences=(
        Consequence(
            "Chroma masks its text",
            lambda model_type, apply_t5_attn_mask: model_type == "chroma" and not apply_t5_attn_mask,
            "apply_t5_attn_mask",
            True,
            "--model_type=chroma switches --apply_t5_attn_mask on: Chroma was made with it",
        ),
        Consequence(
            "split mode is block swap",
            lambda split_mode, blocks_to_swap: split_mode and blocks_to_swap is None,
            "blocks_to_swap",
            18,
            "--split_mode is the older way to say --blocks_to_swap=18",
        ),
        Consequence(
            "Chroma has no guidance",
            lambda model_type, guidance_scale: model_type == "chroma" and guidance_scale != 0,
            "guidance_scale",
            0.0,
            "--guidance_scale={guidance_scale} becomes 0: Chroma is not distilled and knows no guidance",
        ),
    ),
)
