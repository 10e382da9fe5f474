"""What may be said to the script that makes pictures with FLUX.1 and Chroma."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.flags.declare import flag
from library.flags.rules.rule import Rule, Rules
from library.models.flux.flags import FluxModelFlags
from library.models.flux.rules import FLUX_RULES

_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "half"), "float16"),
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
}
_FLOAT8 = dict.fromkeys(("fp8", "float8", "fp8_e4m3fn", "float8_e4m3fn"), "float8_e4m3fn")


def number_format(text: str | None) -> str | None:
    """`bf16` -> `bfloat16`, the name that torch has for it."""
    if text is None:
        return None
    if text.lower() not in _DTYPES:
        raise ValueError(f"expected bf16, fp16 or fp32, got {text!r}")
    return _DTYPES[text.lower()]


def weight_format(text: str | None) -> str | None:
    """As `number_format`, and `fp8`, in which weights can be kept but not calculated with."""
    if text is None:
        return None
    names = {**_DTYPES, **_FLOAT8}
    if text.lower() not in names:
        raise ValueError(f"expected fp8, bf16, fp16 or fp32, got {text!r}")
    return names[text.lower()]


def files_and_multipliers(words: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """`lora.safetensors;0.8` -> ("lora.safetensors", 0.8); without a number it counts in full."""
    pairs = []
    for word in words:
        path, _, number = word.partition(";")
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
        try:
            pairs.append((path, float(number or 1.0)))
        except ValueError:
            raise ValueError(f"expected path;multiplier, got {word!r}") from None
    return tuple(pairs)


@dataclass(frozen=True)
class FluxPictureFlags:
    """Picture"""

    ckpt_path: str | None = flag(None, "the transformer: a .safetensors file or a folder of them", names="model")
    prompt: str = flag("A photo of a cat", "what the picture shows")
    negative_prompt: str | None = flag(None, "what it does not show; has an effect with cfg_scale only")
    output_dir: str = flag(".", "folder for the pictures; made when missing")
    width: int = flag(1360, "width in pixels, enlarged to a multiple of 16", at_least=1)
    height: int = flag(768, "height in pixels, enlarged to a multiple of 16", at_least=1)
    steps: int | None = flag(None, "steps from noise to picture (schnell 4, others 50, unless given)", at_least=1)
    guidance: float = flag(3.5, "guidance that a distilled model (dev) is told", at_least=0.0)
    cfg_scale: float = flag(
        1.0, "guidance away from the negative prompt, which it needs; 1 is off, others take twice the time"
    )
    seed: int | None = flag(None, "seed of the noise; a random one unless given", at_least=0)
    interactive: bool = flag(False, "ask for prompts until an empty line")
    controlnet_image: str | None = flag(None, "picture that the ControlNet follows", names="file")
    lora_weights: tuple[str, ...] = flag(
        (), "LoRA files, each `path;multiplier`; full strength without one", parse=files_and_multipliers
    )
    merge_lora_weights: bool = flag(False, "add LoRA to the weights: faster, but fixed until the end")
    offload: bool = flag(False, "models wait in main memory while another works")
    dtype: str = flag("bfloat16", "number format of all models: bf16, fp16 or fp32", parse=number_format)
    clip_l_dtype: str | None = flag(None, "that of CLIP-L, or fp8", parse=weight_format)
    t5xxl_dtype: str | None = flag(None, "that of T5-XXL, or fp8", parse=weight_format)
    ae_dtype: str | None = flag(None, "that of the autoencoder", parse=number_format)
    flux_dtype: str | None = flag(
        None, "that of the transformer, or fp8: half the memory of 16 bits", parse=weight_format
    )
    tokenizer_cache_dir: str | None = flag(
        None, "folder with copies of the tokenizers; a missing one is fetched once and kept there"
    )


FLUX_PICTURES: tuple[type, ...] = (FluxPictureFlags, FluxModelFlags)
PICTURE_RULES = FLUX_RULES + Rules(
    mistakes=(
        Rule(
            "no transformer",
            lambda ckpt_path: not ckpt_path,
            "--ckpt_path is missing: name the file of the transformer, FLUX.1 or Chroma",
        ),
        Rule(
            "a picture without a ControlNet",
            lambda controlnet_image, controlnet_model_name_or_path: bool(
                controlnet_image and not controlnet_model_name_or_path
            ),
            "--controlnet_image needs --controlnet_model_name_or_path, the ControlNet that follows it",
        ),
    ),
    doubts=(
        Rule(
            "scale without a negative prompt",
            lambda cfg_scale, negative_prompt, interactive: cfg_scale != 1 and not negative_prompt and not interactive,
            "--cfg_scale={cfg_scale} has no effect without --negative_prompt",
        ),
    ),
)
