"""Which base model is trained, and how its text is read."""

from dataclasses import dataclass

from library.flags.declare import flag


def token_length(value: int | None) -> int | None:
    """75 tokens are what None means."""
    return None if value == 75 else value


@dataclass(frozen=True)
class ReadingFlags:
    """Reading of weights"""

    disable_mmap_load_safetensors: bool = flag(False, no_effect="weights are read without memory mapping")


@dataclass(frozen=True)
class ModelFlags:
    """Base model"""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "the model to train: a .safetensors or .ckpt file, a diffusers folder, or a hub id owner/name",
        names="model",
    )
    v2: bool = flag(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = flag(False, "the model predicts velocity, as the 768 pixel versions of 2.x do")
    vae: str | None = flag(None, "take the VAE from this file, folder or hub id, not from the model", names="model")
    tokenizer_cache_dir: str | None = flag(
        None, "folder with copies of the tokenizers; a missing one is fetched once and kept there"
    )
    max_token_length: int | None = flag(
        None,
        "caption length in tokens; longer captions are cut (75 unless given)",
        choices=(None, 75, 150, 225),
        parse=token_length,
    )
    clip_skip: int | None = flag(
        None, "take text features from the n-th layer counted from the end; 1 is the last", at_least=1
    )
