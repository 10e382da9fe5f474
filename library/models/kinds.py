"""What a file of weights is, told by its keys, and which script takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    name: str
    cure: str
    """What to do with it where another kind was wanted."""
    key: str
    """A pattern that is found in one of its keys."""
    pipeline: str = ""
    """Part of the class name in its model_index.json."""
    families: tuple[str, ...] = ()
    """Names of the architectures that take it."""


# The first that fits counts: networks have the names of the model they adapt.
MODELS = (
    Kind(
        "a LoRA or another network",
        "give a whole model here, and this file with --network_weights or --base_weights",
        r"\.(lora_up|lora_down|lora_A|lora_B|hada_w1_a|lokr_w1|lokr_w1_a|oft_diag|oft_blocks)(\.|$)|^lora_(unet|te)",
    ),
    Kind(
        "a ControlNet",
        "give a whole model here",
        r"^control_model\.|^controlnet_|^(input_hint_block|controlnet_blocks)\.",
    ),
    Kind(
        "a Stable Diffusion XL model",
        "use sdxl_train_network.py",
        r"^conditioner\.embedders\.|\.label_emb\.|^add_embedding\.",
        "XL",
        ("sdxl",),
    ),
    Kind(
        "a HunyuanImage model",
        "use hunyuan_image_train_network.py",
        r"(^|\.)byt5_in\.",
        "HunyuanImage",
        ("hunyuan_image",),
    ),
    Kind(
        "a FLUX or Chroma model",
        "use flux_train_network.py",
        r"(^|\.)double_blocks\.|^single_transformer_blocks\.",
        "Flux",
        ("flux",),
    ),
    Kind("a Lumina Image 2 model", "use lumina_train_network.py", r"(^|\.)cap_embedder\.", "Lumina", ("lumina",)),
    Kind("a Stable Diffusion 3 model", "no script here trains it", r"(^|\.)joint_blocks\.", "StableDiffusion3"),
    Kind(
        "a Stable Diffusion model",
        "use train_network.py",
        r"^model\.diffusion_model\.input_blocks\.|^down_blocks\.\d+\.resnets\.",
        "StableDiffusionPipeline",
        ("sd",),
    ),
)

# Parts of a model that are published by themselves; looked for when there is no denoiser.
PARTS = (
    Kind(
        "an autoencoder (VAE) alone",
        "give it with --vae or --ae, and a whole model here",
        r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.",
    ),
    Kind("a CLIP text encoder alone", "give a model here", r"^text_model\.|\.token_embedding\."),
    Kind("a T5 text encoder alone", "give a model here", r"^shared\.weight$|^encoder\.block\.0\.layer\.0\."),
    Kind("a language model alone", "give a model here", r"^(model\.)?(layers\.0\.|embed_tokens\.)"),
)


def kind_of(keys: Sequence[str], kinds: Sequence[Kind] = (*MODELS, *PARTS)) -> Kind | None:
    """The first of `kinds` that one of `keys` fits."""
    for kind in kinds:
        pattern = re.compile(kind.key)
        if any(pattern.search(key) for key in keys):
            return kind
    return None


def kind_of_folder(folder: Path) -> Kind | None:
    """What a folder of diffusers holds, by its model_index.json."""
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    try:
        name = str(json.loads(index.read_text(encoding="utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError):
        return None
    return next((kind for kind in MODELS if kind.pipeline and kind.pipeline in name), None)


def without(families: Collection[str], kinds: Sequence[Kind] = MODELS) -> list[Kind]:
    """The `kinds` that none of the `families` takes."""
    return [kind for kind in kinds if not set(kind.families) & set(families)]
