"""Merge LoRAs for FLUX.1 or Chroma into the models, tensor by tensor, or into one LoRA.

python networks/flux_merge_lora.py --flux_model flux1-dev.safetensors --models a.safetensors b.safetensors \
  --ratios 0.8 0.5 --save_precision bf16 --save_to merged.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from library.flags.tool import run_tool
from networks.core.combining import combine
from networks.core.lora_file import LoraFile, read_lora, write_lora
from networks.core.model_merge import Addition, MergePlan, describe_unmatched, open_model, plan_merge, write_merged
from networks.core.tool_metadata import Family, Parent, network_metadata, spec_of
from networks.core.tool_values import device_of, dtype_of, safetensors_target
from networks.flux_layout import (
    check_names,
    from_diffusers,
    is_diffusers_layout,
    lora_family,
    model_family,
    stated_family,
)

logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model that LoRAs can be merged into: the flags for it and its result, and how its adapters begin."""

    flag: str
    save_flag: str
    prefix: str


MODELS = (
    Model("flux_model", "save_to", "lora_unet"),
    Model("clip_l", "clip_l_save_to", "lora_te1"),
    Model("t5xxl", "t5xxl_save_to", "lora_te3"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Write the merged files; 1 and one message if something does not fit."""
    return run_tool(make_parser(), merge, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="*", help="LoRAs to merge")
    add("--ratios", type=float, nargs="*", help="how strongly each is added (1 each unless given)")
    add("--flux_model", help="FLUX.1 or Chroma, to merge into; without any model one LoRA is made of all")
    add("--clip_l", help="CLIP-L, to merge the LoRAs' part for it into")
    add("--t5xxl", help="T5-XXL, to merge the LoRAs' part for it into")
    add("--save_to", help=".safetensors file to write: the merged transformer, or the LoRA made of all")
    add("--clip_l_save_to", help=".safetensors file for the merged CLIP-L")
    add("--t5xxl_save_to", help=".safetensors file for the merged T5-XXL")
    add("--precision", default="float", help="format of the sums: float, fp16 or bf16 (default: float)")
    add("--save_precision", help="format to write: float, fp16, bf16, fp8_e4m3fn, fp8_e5m2 (default: --precision)")
    add("--loading_device", default="cpu", help="where the LoRAs lie while models are merged (default: cpu)")
    add("--working_device", default="cpu", help="where sums are made, cuda for one (default: cpu)")
    add("--mem_eff_load_save", action="store_true", help="no effect: one tensor of the model is in memory, always")
    add("--concat", action="store_true", help="one LoRA: put ranks beside each other, which adds the exact effects")
    add("--shuffle", action="store_true", help="one LoRA: permute the ranks of each layer")
    add("--diffusers", action="store_true", help="insist that the LoRAs have key names of diffusers")
    add("--no_metadata", action="store_true", help="write no modelspec and no metadata of the source")
    return parser


def merge(arguments: argparse.Namespace) -> None:
    """Write the merged files; raises ValueError if a flag or a file does not fit."""
    if not arguments.models:
        raise ValueError("--models is missing: name the LoRAs to merge")
    ratios = arguments.ratios or [1.0] * len(arguments.models)
    if len(ratios) != len(arguments.models):
        raise ValueError(f"--ratios has {len(ratios)} values for {len(arguments.models)} --models; give one for each")
    given = [model for model in MODELS if getattr(arguments, model.flag)]
    stray = [m.save_flag for m in MODELS[1:] if getattr(arguments, m.save_flag) and m not in given]
    if stray:
        raise ValueError(f"--{stray[0]} has nothing to write: --{stray[0].removesuffix('_save_to')} is missing")
    if not given:
        merge_loras(arguments, ratios)
        return
    for flag in ("concat", "shuffle"):
        if getattr(arguments, flag):
            logger.warning("--%s has no effect where LoRAs are merged into a model", flag)
    merge_into_models(arguments, ratios, given)


def merge_into_models(arguments: argparse.Namespace, ratios: Sequence[float], given: Sequence[Model]) -> None:
    """Write each of the `given` models with the LoRAs' part for it; every size is checked before the first write."""
    precision = dtype_of(arguments.precision, "precision")
    stored = dtype_of(arguments.save_precision or arguments.precision, "save_precision", stored=True)
    device = device_of(arguments.working_device, "working_device")
    targets = {model: safetensors_target(getattr(arguments, model.save_flag), model.save_flag) for model in given}
    loras = read_loras(arguments, device_of(arguments.loading_device, "loading_device"))
    additions: dict[str, list[Addition]] = {}
    for lora, ratio in zip(loras, ratios, strict=True):
        for name, pair in lora.pairs.items():
            additions.setdefault(name, []).append(Addition(pair, ratio, lora.path))
    with ExitStack() as stack:
        opened = {model: stack.enter_context(open_model(getattr(arguments, model.flag))) for model in given}
        families = {
            model: model_family(opened[model].keys(), str(opened[model].path)) for model in given if model is MODELS[0]
        }
        for lora in loras if families else ():
            warn_of_family(lora, families[MODELS[0]], str(opened[MODELS[0]].path))
        plans: dict[Model, MergePlan] = {}
        for model, file in opened.items():
            plans[model], unmatched = plan_merge(file, model.prefix, additions, stored)
            if not plans[model].additions:
                raise ValueError(
                    f"--{model.flag} {file.path}: no layer of it has a LoRA in {', '.join(arguments.models)}"
                )
            if unmatched:
                raise ValueError(describe_unmatched(unmatched, str(file.path)) + ": the LoRA is for another model")
        idle = [name for name in additions if not name.startswith(tuple(f"{model.prefix}_" for model in given))]
        if idle:
            logger.warning("%s; give their model too, or they are left out", describe_unmatched(idle, "these models"))
        for model, file in opened.items():
            metadata = {} if arguments.no_metadata else dict(file.metadata)
            if model in families and not arguments.no_metadata:
                parents = [Parent(str(file.path), file.metadata)]
                parents += [Parent(lora.path, lora.metadata) for lora in loras]
                metadata = {key: value for key, value in metadata.items() if not key.startswith("modelspec.")}
                metadata |= spec_of(families[model], targets[model], parents, None)
            write_merged(file, plans[model], targets[model], precision, device, metadata)


def warn_of_family(lora: LoraFile, family: Family, model: str) -> None:
    """Say so if a LoRA was trained on FLUX.1 and the model is Chroma, or the other way round."""
    trained_on = stated_family(lora)
    if trained_on is not None and trained_on.base_version != family.base_version:
        logger.warning(
            "%s says that it was trained on %s, and %s is %s: its layers fit, and its effect may not",
            lora.path,
            trained_on.architecture,
            model,
            family.architecture,
        )


def merge_loras(arguments: argparse.Namespace, ratios: Sequence[float]) -> None:
    """Write one LoRA made of all."""
    precision = dtype_of(arguments.precision, "precision")
    stored = dtype_of(arguments.save_precision or arguments.precision, "save_precision")
    device = device_of(arguments.working_device, "working_device")
    target = safetensors_target(arguments.save_to, "save_to")
    loras = read_loras(arguments, device_of(arguments.loading_device, "loading_device"))
    order = torch.Generator().manual_seed(torch.seed()) if arguments.shuffle else None
    pairs = combine(loras, ratios, arguments.concat, order, precision, device)
    parents = [Parent(lora.path, lora.metadata) for lora in loras]
    metadata = network_metadata(
        pairs, "networks.lora_flux", lora_family(loras), target, parents, not arguments.no_metadata
    )
    write_lora(pairs, target, metadata, stored)
    logger.info("%s: %d adapters from %d files", target, len(pairs), len(loras))


def read_loras(arguments: argparse.Namespace, device: torch.device) -> list[LoraFile]:
    """All LoRAs under sd-scripts' names."""
    loras = []
    for path in arguments.models:
        file = read_lora(path, device)
        if is_diffusers_layout(file):
            file = replace(file, pairs=from_diffusers(file))
        elif arguments.diffusers:
            raise ValueError(f"--diffusers: {path} has no key names of diffusers, but {next(iter(file.pairs))}")
        check_names(file)
        loras.append(file)
    return loras


if __name__ == "__main__":
    sys.exit(main())
