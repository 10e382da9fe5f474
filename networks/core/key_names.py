"""What adapters are called in a file, and what the keys of a file say about the network in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class AdapterShape:
    """The size of one adapter."""

    rank: int
    alpha: float


def adapter_name(prefix: str, path: str) -> str:
    """The name of the adapter on the layer at `path`: `lora_unet` and `mid_block.x` give `lora_unet_mid_block_x`."""
    return f"{prefix}_{path.replace('.', '_')}"


def clip_path(path: str) -> str:
    """The path of a layer of a CLIP text encoder as files name it.

    Names always have the level `text_model`; whether the module has it depends on the class and on the version of
    transformers.
    """
    return path if path.startswith("text_model.") else f"text_model.{path}"


def adapter_shapes(weights: Mapping[str, Tensor]) -> dict[str, AdapterShape]:
    """Rank and alpha of every adapter among `weights`, by name; alpha is the rank where there is none or 0."""
    shapes = {}
    for key, tensor in weights.items():
        name, _, part = key.partition(".")
        if part == DOWN:
            rank = tensor.shape[0]
            alpha = weights.get(f"{name}.{ALPHA}")
            shapes[name] = AdapterShape(rank, float(rank) if alpha is None else float(alpha) or float(rank))
    return shapes


def check_known(found: Iterable[str], known: Iterable[str], source: str | os.PathLike[str] | None) -> list[str]:
    """The keys of a weights file, `found`, that belong to none of the adapters `known`.

    Raises:
        ValueError: no key belongs; says what the file seems to hold.
    """
    found, known = list(found), set(known)
    foreign = [key for key in found if key.partition(".")[0] not in known]
    if found and len(foreign) == len(found):
        raise ValueError(
            f"{source or 'the weights'}: none of the {len(found)} keys belongs to this model ({dialect(found)}); "
            f"the first is {found[0]!r}, where something like {min(known, default='lora_unet_...')}.{DOWN!s} "
            "is expected"
        )
    return foreign


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
    (re.compile(r"\.(hada|lokr|oft|diff|dora)_"), "it was made by LyCORIS; use --network_module lycoris.kohya"),
    (re.compile(r"^lora_unet_(double|single)_blocks_"), "it is a LoRA for FLUX or HunyuanImage"),
    (re.compile(r"^lora_te[12]_|^lora_unet_(input|output|middle)_block"), "it is a LoRA for SDXL"),
    (re.compile(r"^lora_unet_(down|up|mid)_block"), "it is a LoRA for Stable Diffusion 1.x or 2.x"),
    (re.compile(r"^lora_unet_layers_"), "it is a LoRA for Lumina"),
    (re.compile(r"^(lora_)?lllite_"), "it is a ControlNet-LLLite"),
    (re.compile(r"^(model\.diffusion_model|down_blocks|first_stage_model)\."), "it is a model, not a LoRA"),
)
