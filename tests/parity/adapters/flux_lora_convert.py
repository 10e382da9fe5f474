"""A LoRA for FLUX in the layout of sd-scripts made one of diffusers', and the other way round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import convert_flux_lora

MANY_ROWS = 2048
"""Of longer outputs, every 64th row was recorded."""


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    seed, facts = case["seed"], case["facts"]
    dense = recipe.state_dict(case["checkpoint"], seed)
    dense |= {key: torch.tensor(facts["alpha"]) for key in dense if key.endswith(".alpha")}
    outputs = named("to_ait_dense", convert(dense, "sd-scripts", "ai-toolkit"), facts["to_ait_dense_keys"])
    sparse = block_diagonal_only(recipe.state_dict(case["sparse_checkpoint"], f"{seed}-sparse"), facts["sparse_rank"])
    outputs |= named("to_ait_sparse", convert(sparse, "sd-scripts", "ai-toolkit"), facts["to_ait_sparse_keys"])
    theirs = recipe.state_dict(case["ait_checkpoint"], seed)
    outputs |= named("to_sds", convert(theirs, "ai-toolkit", "sd-scripts"), facts["to_sds_keys"])
    return {name: outputs[name] for name in case["outputs"]}


def convert(tensors: dict[str, Tensor], src: str, dst: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        save_file(tensors, source, {"ss_note": "kept"})
        words = ["--src", src, "--dst", dst, "--src_path", str(source), "--dst_path", str(target)]
        assert convert_flux_lora.main(words) == 0
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"ss_note": "kept"}
        return load_file(target)


def named(direction: str, tensors: dict[str, Tensor], keys: dict[str, Any]) -> dict[str, Tensor]:
    assert {key: list(value.shape) for key, value in tensors.items()} == keys
    return {
        f"{direction}/{key}": value[::64] if value.dim() and len(value) > MANY_ROWS else value
        for key, value in tensors.items()
    }


def block_diagonal_only(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The recorded input: joined layers have nothing outside the blocks of their parts; alpha is the rank."""
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(float(rank))
        elif key.endswith(("qkv.lora_up.weight", "linear1.lora_up.weight")):
            rows = [3072, 3072, 3072, 12288] if "linear1" in key else [len(value) // 3] * 3
            ranks = [rank // len(rows)] * len(rows)
            ones = torch.block_diag(*(torch.ones(r, c) for r, c in zip(rows, ranks, strict=True)))
            tensors[key] = value * ones
    return tensors
