"""LoRAs merged into a model's file, tensor by tensor: the model is never in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.files.streaming import stream_safetensors
from library.files.weights import WeightFile, describe_keys, open_weights
from networks.core.key_names import adapter_name
from networks.core.lora_file import LowRankPair

logger = logging.getLogger(__name__)

WRAPPERS = ("model.diffusion_model.",)
"""What may stand before the published names of a denoiser's weights, in files of whole models."""
SCALED = (".scale_weight", ".weight_scale", "scaled_fp8")
"""Ends of keys that say: the values of this file are to be multiplied before they mean anything."""


@dataclass(frozen=True)
class Addition:
    """One adapter and how strongly it is added."""

    pair: LowRankPair
    ratio: float
    source: str
    """The file it comes from, for messages."""


@dataclass(frozen=True)
class MergePlan:
    """What becomes of a model's file."""

    additions: dict[str, list[Addition]]
    """By key of the model."""
    shapes: dict[str, Tensor]
    """What will be written, on the meta device."""


def plan_merge(
    model: WeightFile, prefix: str, loras: Mapping[str, Sequence[Addition]], dtype: torch.dtype
) -> tuple[MergePlan, list[str]]:
    """Find the weight of each adapter in `loras` whose name begins with `prefix`; also those that found none.

    Raises:
        ValueError: the model's weights are scaled, or a size is wrong; names both files.
    """
    scaled = [key for key in model.keys() if key.endswith(SCALED)]
    if scaled:
        raise ValueError(
            f"{model.path}: {scaled[0]} says that its fp8 weights are scaled, which a LoRA cannot be merged into; "
            "merge into the bf16 or fp16 file of the model"
        )
    additions: dict[str, list[Addition]] = {}
    shapes: dict[str, Tensor] = {}
    left = {name for name in loras if name.startswith(f"{prefix}_")}
    for key in model.keys():
        stored, shape = model.dtype(key), model.shape(key)
        shapes[key] = torch.empty(shape, dtype=dtype if stored.is_floating_point else stored, device="meta")
        name = adapter_name(prefix, path_of_layer(key))
        if not key.endswith(".weight") or name not in left:
            continue
        left.discard(name)
        for addition in loras[name]:
            _check_fit(addition, name, key, shape, model)
        additions[key] = list(loras[name])
    return MergePlan(additions, shapes), sorted(left)


def write_merged(
    model: WeightFile,
    plan: MergePlan,
    save_to: str | os.PathLike[str],
    precision: torch.dtype,
    device: torch.device | str,
    metadata: Mapping[str, str],
) -> None:
    """Write the model with everything added: sums are made in float32 on `device`, then rounded to `precision`.

    One weight of the model is in memory at a time.

    Raises:
        ValueError: `save_to` is the file that is read, or not a .safetensors file.
    """
    target = Path(save_to)
    if target.exists() and target.samefile(model.path):
        raise ValueError(f"{target} is the model that is read; give the result another name")

    def value(key: str) -> Tensor:
        weight = model.read(key)
        if key in plan.additions:
            weight = added(weight, plan.additions[key], device).to(precision)
        elif weight.is_floating_point():
            weight = weight.to(precision)
        return weight.to(device="cpu", dtype=plan.shapes[key].dtype)

    stream_safetensors(plan.shapes, value, target, metadata)
    logger.info("%s: LoRA merged into %d of %d tensors", target, len(plan.additions), len(plan.shapes))


@torch.no_grad()
def added(weight: Tensor, additions: Sequence[Addition], device: torch.device | str = "cpu") -> Tensor:
    """`weight` plus all `additions`, in float32, without another tensor of its size."""
    total = weight.to(device, torch.float32, copy=True)
    flat = total.flatten(1)
    for addition in additions:
        pair = addition.pair.to(device)
        flat.addmm_(pair.up.float().flatten(1), pair.down.float().flatten(1), alpha=addition.ratio * pair.scale)
    return flat.view(weight.shape)


def open_model(path: str | os.PathLike[str]) -> WeightFile:
    """A model's file; a LoRA in its place is an error."""
    model = open_weights(path)
    if any(".lora_" in key for key in model.keys()):
        model.close()
        raise ValueError(f"{path} is a LoRA; the file of a model is needed here")
    return model


def describe_unmatched(names: Sequence[str], model: str) -> str:
    """What to say about adapters that found no weight."""
    return f"{len(names)} adapters have no layer in {model}, such as {describe_keys(names, 2)}"


def path_of_layer(key: str) -> str:
    """The path of a weight's layer, without what stands before it in files of whole models."""
    for wrapper in WRAPPERS:
        key = key.removeprefix(wrapper)
    return key.removesuffix(".weight")


def _check_fit(addition: Addition, name: str, key: str, shape: tuple[int, ...], model: WeightFile) -> None:
    down, up = addition.pair.down, addition.pair.up
    ours = (up.shape[0], down.shape[1:].numel())
    if ours != (shape[0], torch.Size(shape[1:]).numel()):
        raise ValueError(
            f"{addition.source}: {name} is for a layer of {ours[0]} x {ours[1]} and {key} of {model.path} is "
            f"{' x '.join(map(str, shape))}: the LoRA was made for another model"
        )
