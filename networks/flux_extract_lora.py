"""Make a LoRA of the difference between two FLUX.1 or Chroma transformers.

python networks/flux_extract_lora.py --model_org flux1-dev.safetensors --model_tuned tuned.safetensors --dim 32 \
  --save_precision fp16 --save_to extracted.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from library.files.weights import WeightFile
from library.flags.tool import at_least_one, run_tool
from networks.core.extraction import closest_pair
from networks.core.key_names import adapter_name
from networks.core.lora_file import LowRankPair, write_lora
from networks.core.model_merge import open_model, path_of_layer
from networks.core.tool_metadata import network_metadata
from networks.core.tool_values import device_of, dtype_of, safetensors_target
from networks.flux_layout import is_flux_name, model_family

logger = logging.getLogger(__name__)

PRECISIONS = ("float", "fp16", "bf16")
EVERY = 50
"""Layers between two lines of the log."""


def main(words: Sequence[str] | None = None) -> int:
    """Write the LoRA; 1 and one message if the models do not fit."""
    return run_tool(make_parser(), extract, words)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model_org", required=True, help="the model before")
    add("--model_tuned", required=True, help="the model after")
    add("--save_to", required=True, help=".safetensors file to write")
    add("--dim", type=at_least_one, default=4, help="rank of the LoRA (default: 4)")
    add("--save_precision", choices=(None, *PRECISIONS), help="format to write (default: float)")
    add("--device", help="where singular values are computed, cuda for one (default: cpu)")
    add(
        "--clamp_quantile",
        type=float,
        default=0.99,
        help="values above this quantile of all magnitudes are cut off; 1 cuts nothing (default: 0.99)",
    )
    add("--mem_eff_safe_open", action="store_true", help="no effect: two tensors are in memory at a time, always")
    add("--no_metadata", action="store_true", help="write no modelspec")
    return parser


def extract(arguments: argparse.Namespace) -> None:
    """Write the LoRA; raises ValueError if the models do not fit."""
    if not 0 < arguments.clamp_quantile <= 1:
        raise ValueError(f"--clamp_quantile {arguments.clamp_quantile}: expected more than 0 and at most 1")
    device = device_of(arguments.device, "device")
    target = safetensors_target(arguments.save_to, "save_to")
    dtype = dtype_of(arguments.save_precision or "float", "save_precision")
    with open_model(arguments.model_org) as before, open_model(arguments.model_tuned) as after:
        family = model_family(before.keys(), str(before.path))
        model_family(after.keys(), str(after.path))
        layers = common_layers(before, after)
        pairs: dict[str, LowRankPair] = {}
        for name, (old, new) in layers.items():
            difference = after.read(new).to(device, torch.float32) - before.read(old).to(device, torch.float32)
            try:
                pairs[name] = closest_pair(difference, arguments.dim, arguments.clamp_quantile).to("cpu")
            except ValueError as error:
                raise ValueError(f"{new} of {after.path} or {old} of {before.path}: {error}") from error
            if len(pairs) % EVERY == 0:
                logger.info("%d of %d layers", len(pairs), len(layers))
    metadata = network_metadata(
        pairs, "networks.lora_flux", family, target, with_spec=not arguments.no_metadata, args="{}"
    )
    metadata |= {"ss_network_dim": str(arguments.dim), "ss_network_alpha": str(float(arguments.dim))}
    write_lora(pairs, target, metadata, dtype)
    logger.info("%s: %d adapters of rank %d", target, len(pairs), arguments.dim)


def common_layers(before: WeightFile, after: WeightFile) -> dict[str, tuple[str, str]]:
    """The layers of all blocks by the name of their adapter, with both models' keys.

    Raises:
        ValueError: the models have not the same blocks, or a weight differs in shape.
    """
    old, new = _block_layers(before), _block_layers(after)
    if old.keys() != new.keys():
        first = sorted(old.keys() ^ new.keys())[0]
        raise ValueError(f"{before.path} and {after.path} do not have the same layers: {first} is in one of them only")
    for name in old:
        if before.shape(old[name]) != after.shape(new[name]):
            shapes = f"{list(before.shape(old[name]))} in {before.path} and {list(after.shape(new[name]))}"
            raise ValueError(f"{old[name]} is {shapes} in {after.path}; the models differ in size")
    return {name: (old[name], new[name]) for name in old}


def _block_layers(file: WeightFile) -> dict[str, str]:
    """Adapter name -> key, for the linear layers of double and single blocks."""
    named = {adapter_name("lora_unet", path_of_layer(key)): key for key in file.keys() if key.endswith(".weight")}
    return {name: key for name, key in named.items() if "_blocks_" in name and is_flux_name(name)}


if __name__ == "__main__":
    sys.exit(main())
