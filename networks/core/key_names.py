"""What adapters are called in a file, and what the keys of a file say about the network in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class AdapterShape:
    """The size of one adapter."""

    rank: int
    alpha: float
    tensors: Mapping[str, tuple[int, ...]] | None = field(default=None, compare=False)
    """In a file: the shapes of its tensors, by the end of the key."""


def adapter_name(prefix: str, path: str) -> str:
    """The name of the adapter on the layer at `path`: `lora_unet` and `mid_block.x` give `lora_unet_mid_block_x`."""
    return f"{prefix}_{path.replace('.', '_')}"


def clip_path(path: str) -> str:
    """The path of a layer of a CLIP text encoder as files name it.

    Names always have the level `text_model`; whether the module has it depends on the class and on the version of
    transformers.
    """
    return path if path.startswith("text_model.") else f"text_model.{path}"


RANKS = {
    DOWN: 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "oft_blocks": 0,
}  # fmt: skip
"""End of a key -> the dimension of its tensor that is the rank of the adapter."""
MARKS = (DOWN, "hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks")
"""Of these ends every adapter that can be read has one."""


def adapter_shapes(weights: Mapping[str, Tensor]) -> dict[str, AdapterShape]:
    """Rank and alpha of every adapter among `weights`, by name; alpha is the rank where there is none or 0.

    An adapter that has no part of low rank has the rank that its alpha says.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in weights.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = tuple(tensor.shape)
    shapes = {}
    for name, tensors in found.items():
        if not any(mark in tensors for mark in MARKS) or len(tensors.get("oft_blocks", (0, 0, 0))) != 3:
            continue
        alpha = float(weights[f"{name}.{ALPHA}"]) if ALPHA in tensors else 0.0
        sizes = [tensors[part][dim] for part, dim in RANKS.items() if part in tensors]
        rank = sizes[0] if sizes else max(int(alpha), 1)
        shapes[name] = AdapterShape(rank, alpha or float(rank), tensors)
    return shapes


def with_own_names(weights: Mapping[str, Tensor], other_names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """`weights` with every adapter called as here; `other_names` are the names that some files have -> those here.

    They are `weights` themselves if there is nothing to rename, or the file is for another model: one that has
    transformers where this one has none.
    """
    names = {key.partition(".")[0] for key in weights}
    foreign = [name for name in names if name not in other_names and _OF_A_TRANSFORMER.match(name)]
    if foreign or names.isdisjoint(other_names):
        return weights
    renamed = {}
    for key, tensor in weights.items():
        name, dot, end = key.partition(".")
        renamed[f"{other_names.get(name, name)}{dot}{end}"] = tensor
    return renamed


_OF_A_TRANSFORMER = re.compile(r"lora_unet_(?:(?:down|up)_blocks_\d+|mid_block)_attentions_\d+_transformer_blocks_")
"""In a U-Net whose blocks are named level by level."""


def check_known(found: Iterable[str], known: Iterable[str], source: str | os.PathLike[str] | None) -> list[str]:
    """The keys of a weights file, `found`, that belong to none of the adapters `known`.

    Raises:
        ValueError: no key belongs, or none of those of the denoiser; says what the file seems to hold.
    """
    found, known = list(found), set(known)
    foreign = [key for key in found if key.partition(".")[0] not in known]
    if found and len(foreign) == len(found):
        raise ValueError(
            f"{source or 'the weights'}: none of the {len(found)} keys belongs to this model ({dialect(found)}); "
            f"the first is {found[0]!r}, where something like {min(known, default='lora_unet_...')}.{DOWN!s} "
            "is expected"
        )
    # Families share text encoders, so that a file for another one still has keys with a place.
    own, theirs = ([name for name in names if _OF_A_DENOISER in name] for names in (known, foreign))
    if own and theirs and not any(_OF_A_DENOISER in key and key not in theirs for key in found):
        raise ValueError(
            f"{source or 'the weights'}: only layers of text encoders have a place in this model, and none of the "
            f"denoiser ({dialect(theirs)}); the first without one is {theirs[0]!r}, where something like "
            f"{min(own)}.{DOWN!s} is expected"
        )
    return foreign


_OF_A_DENOISER = "_unet_"
"""In the name of every adapter on a denoiser, whatever kind it is of."""


def dialect(keys: list[str]) -> str:
    """What a file with such keys seems to be, in words."""
    for pattern, meaning in _DIALECTS:
        if any(pattern.search(key) for key in keys):
            return meaning
    return "its keys are unknown"


_DIALECTS = (
    (
        re.compile(r"\.lora_[AB]\.|\.lora\.(down|up)\.|lora_linear_layer"),
        "it has the key names of PEFT or diffusers; convert it to lora_down / lora_up keys first, a LoRA for FLUX.1 or "
        "Chroma with networks/convert_flux_lora.py",
    ),
    (
        re.compile(r"\.(oft_diag|diff|diff_b|w_norm|a1\.weight)$"),
        "it was made by LyCORIS; use --network_module lycoris.kohya",
    ),
    (re.compile(r"^lora_unet_(double|single)_blocks_"), "it is a LoRA for FLUX or HunyuanImage"),
    (re.compile(r"^lora_te[12]_|^lora_unet_(input|output|middle)_block"), "it is a LoRA for SDXL"),
    (re.compile(r"^lora_unet_(down|up|mid)_block"), "it is a LoRA for Stable Diffusion 1.x or 2.x"),
    (re.compile(r"^lora_unet_layers_"), "it is a LoRA for Lumina"),
    (re.compile(r"^(lora_)?lllite_"), "it is a ControlNet-LLLite"),
    (re.compile(r"^(model\.diffusion_model|down_blocks|first_stage_model)\."), "it is a model, not a LoRA"),
)
