"""LoRA files as the tools see them: pairs of thin matrices by name, whatever the layout of their keys."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.files.hashing import precalculate_safetensors_hashes
from library.files.weights import WeightFile, describe_keys, open_weights, save_safetensors
from networks.core.key_names import ALPHA, DOWN, UP
from networks.core.merge import low_rank_difference

PAIR_ENDS = ((DOWN, UP), ("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight"))
"""What the two matrices are called: sd-scripts; PEFT, diffusers and ai-toolkit; older diffusers."""
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the settings of PEFT, as JSON; its files have no alpha among their keys."""
HASHES = ("sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class LowRankPair:
    """One adapter: `scale * up @ down` is added to a weight. down is [r, C] or [r, C, k, k], up [O, r] or 4-D."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """How thin the two are."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank

    def difference(self, shape: torch.Size, factor: float = 1.0) -> Tensor:
        """What is added to a weight of `shape`, times `factor`, in float32."""
        return low_rank_difference(self.down, self.up, factor * self.scale, shape)

    def to(self, device: torch.device | str) -> LowRankPair:
        """The same on another device."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))


@dataclass(frozen=True)
class LoraFile:
    """What was read: adapters by name, the name as the file has it."""

    path: str
    pairs: dict[str, LowRankPair]
    metadata: dict[str, str]


def read_lora(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> LoraFile:
    """All adapters of a LoRA file, in any layout of `PAIR_ENDS`; alpha is the rank where the file has none.

    Raises:
        ValueError: a key is no part of a LoRA, one of a pair is missing, or the ranks of a pair differ.
        FileNotFoundError: there is no such file.
    """
    with open_weights(path) as file:
        parts, alphas = _sorted_keys(file)
        peft_alpha = _peft_alphas(file.metadata)
        pairs = {}
        for name, (down_key, up_key) in parts.items():
            down, up = file.read(down_key).to(device), file.read(up_key).to(device)
            if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0]:
                shapes = f"{down_key} is {list(down.shape)} and {up_key} is {list(up.shape)}"
                raise ValueError(f"{file.path}: {shapes}; their ranks, first and second number, must be equal")
            rank = down.shape[0]
            alpha = float(file.read(alphas[name])) if name in alphas else peft_alpha(name, rank)
            if not math.isfinite(alpha):
                raise ValueError(f"{file.path}: {name}.alpha is {alpha}; the file is damaged")
            pairs[name] = LowRankPair(down, up, alpha or float(rank))
        return LoraFile(str(file.path), pairs, dict(file.metadata))


def write_lora(
    pairs: Mapping[str, LowRankPair],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    ends: tuple[str, str] = PAIR_ENDS[0],
    hashed: bool = True,
) -> None:
    """Write adapters under the key names `ends`, with the hashes of what is written.

    Alpha is a key of its own, except in PEFT's layout, where it must be the rank and is left out. Every tensor,
    alpha too, gets `dtype`, or keeps its own, alpha having that of its matrices.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors[f"{name}.{ends[0]}"] = pair.down.to("cpu", dtype)
        tensors[f"{name}.{ends[1]}"] = pair.up.to("cpu", dtype)
        if ends == PAIR_ENDS[0]:
            tensors[f"{name}.{ALPHA}"] = torch.tensor(pair.alpha, dtype=dtype or pair.down.dtype)
        else:
            assert pair.alpha == pair.rank, f"{name}: a scale that its layout cannot hold"
    # Two names may share one matrix, which a safetensors file cannot say.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    kept = {key: value for key, value in metadata.items() if key not in HASHES}
    hashes = dict(zip(HASHES, precalculate_safetensors_hashes(tensors, kept), strict=True)) if hashed else {}
    save_safetensors(tensors, path, kept | hashes)


def _sorted_keys(file: WeightFile) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The keys of both matrices, and that of alpha, by the name of the adapter."""
    found: dict[str, dict[int, str]] = {}
    alphas: dict[str, str] = {}
    foreign = []
    for key in file.keys():
        end = next((end for ends in PAIR_ENDS for end in ends if key.endswith("." + end)), None)
        if end is not None:
            side = next(ends.index(end) for ends in PAIR_ENDS if end in ends)
            found.setdefault(key[: -len(end) - 1], {})[side] = key
        elif key.endswith("." + ALPHA):
            alphas[key[: -len(ALPHA) - 1]] = key
        else:
            foreign.append(key)
    if foreign:
        raise ValueError(
            f"{file.path}: {len(foreign)} keys are no part of a LoRA, such as {describe_keys(foreign, 2)}; only files "
            "of lora_down and lora_up (or lora_A and lora_B) can be worked on: no whole models, LoHa, LoKr, OFT, DoRA"
        )
    if not found:
        raise ValueError(f"{file.path}: there is no LoRA in it")
    alone = [keys.popitem()[1] for keys in found.values() if len(keys) == 1]
    if alone:
        raise ValueError(f"{file.path}: {len(alone)} keys lack the other half of their pair: {describe_keys(alone, 2)}")
    return {name: (keys[0], keys[1]) for name, keys in found.items()}, alphas


def _peft_alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """What alpha is where no key says it, as a function of name and rank."""
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError:
        settings = {}

    def alpha(name: str, rank: int) -> float:
        component, _, layer = name.partition(".")
        value = settings.get(f"{component}.lora_alpha")
        patterns = settings.get(f"{component}.alpha_pattern") or {}
        for pattern, own in patterns.items():
            if layer == pattern or layer.endswith("." + pattern):
                value = own
        if value is None:
            return float(rank)
        return float(value) * (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else 1.0)

    return alpha
