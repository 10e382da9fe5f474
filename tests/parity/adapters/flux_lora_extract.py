"""A LoRA made of the difference between two FLUX transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import flux_extract_lora


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    seed, config, facts = case["seed"], case["config"], case["facts"]
    before = recipe.state_dict(case["checkpoint"], seed)
    ranks = torch.arange(1, config["true_rank"] + 1)
    after = dict(before)
    changes = {}
    for key, weight in before.items():
        if weight.dim() == 2 and key.startswith(("double_blocks.", "single_blocks.")):
            up = recipe.weight(f"tune_up.{key}", (weight.shape[0], len(ranks)), seed) / ranks
            change = 0.2 * up @ recipe.weight(f"tune_down.{key}", (len(ranks), weight.shape[1]), seed)
            after[key] = weight + change
            changes["lora_unet_" + key.removesuffix(".weight").replace(".", "_")] = change
    with tempfile.TemporaryDirectory() as folder:
        save_file(before, f"{folder}/before.safetensors")
        save_file(after, f"{folder}/after.safetensors")
        exact = extract(Path(folder), config["dim"], 1.0, facts)
        clamped = extract(Path(folder), config["dim"], config["clamp_quantile"], facts)
    for found, recorded in ((clamped, "relative_error"), (exact, "relative_error_quantile_1")):
        for name, error in facts[recorded].items():
            ours = float((changes[name] - found[name]).norm() / changes[name].norm())
            # A quantile of magnitudes cuts less than the recorded one of signed values.
            assert ours <= error + 0.03, f"{name}: {ours} instead of {error}"
    return {name: exact[name.removeprefix("delta/")][::32, ::16] for name in case["outputs"]}


def extract(folder: Path, dim: int, quantile: float, facts: dict[str, Any]) -> dict[str, Tensor]:
    target = folder / "x.safetensors"
    models = ["--model_org", str(folder / "before.safetensors"), "--model_tuned", str(folder / "after.safetensors")]
    words = [*models, "--save_to", str(target), "--dim", str(dim), "--clamp_quantile", str(quantile)]
    assert flux_extract_lora.main(words) == 0
    tensors = load_file(target)
    assert {key: list(value.shape) for key, value in tensors.items()} == {k: s for k, (s, _) in facts["keys"].items()}
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    for key, value in facts["metadata"].items():
        if value != "..." and key != "modelspec.implementation_version":
            assert metadata[key] == value, key
    names = {key.split(".")[0] for key in tensors}
    return {name: tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] for name in names}
