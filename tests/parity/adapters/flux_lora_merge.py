"""LoRAs for FLUX merged into a transformer, and into each other.

Two behaviours are mended. Recorded, a ratio scales both matrices, so that the effect is its square: given the square,
ours has the recorded matrices. Recorded, joined ranks keep alpha, so that the effect shrinks: ours has an alpha in
proportion to the rank, and matrices that keep what each file alone would do.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import flux_merge_lora

LORAS = {"one": "lora_one", "two": "lora_two", "three": "lora_three"}
CONCAT = "lora_unet_double_blocks_0_txt_attn_proj"


def run(case: dict[str, Any], recipe: ModuleType) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return Case(case, recipe, Path(folder)).outputs()


class Case:
    def __init__(self, case: dict[str, Any], recipe: ModuleType, folder: Path) -> None:
        self.case, self.folder, self.config = case, folder, case["config"]
        self.model = folder / "model.safetensors"
        save_file(recipe.state_dict(case["checkpoint"], case["seed"]), self.model)
        alphas = dict(zip(("one", "two"), self.config["alphas"], strict=True))
        # "three" has the ranks of "one" and the alpha of "two".
        alphas["three"] = alphas["two"]
        for name, section in LORAS.items():
            tensors = {
                key: torch.tensor(alphas[name])
                if key.endswith(".alpha")
                else recipe.weight(f"{name}.{key}", tuple(shape), case["seed"])
                for key, (shape, _) in case[section].items()
            }
            save_file(tensors, self.file(name), {"modelspec.title": f"l{list(LORAS).index(name) + 1}"})
        theirs = {key: recipe.weight(key, tuple(shape), case["seed"]) for key, shape in case["diffusers_lora"].items()}
        save_file(theirs, self.file("theirs"))

    def outputs(self) -> dict[str, Tensor]:
        ratios, facts = self.config["ratios"], self.case["facts"]
        into = ["--flux_model", str(self.model)]
        merged, metadata = self.merge(["one", "two"], ratios, *into)
        assert sorted(metadata) == facts["model_metadata_keys"]
        assert {str(value.dtype) for value in merged.values()} == {facts["model_dtype"]}
        halved, _ = self.merge(["one", "two"], ratios, *into, "--save_precision", "bf16")
        assert {str(value.dtype) for value in halved.values()} == set(facts["save_precision_bf16"])
        squares = [ratio * abs(ratio) for ratio in ratios]
        sums, metadata = self.merge(["one", "three"], squares)
        self.check_metadata(metadata)
        negative, metadata = self.merge(["one"], [-0.25], "--no_metadata")
        assert sorted(metadata) == facts["no_metadata_keys"]
        theirs, _ = self.merge(["theirs"], [0.7], *into, "--diffusers")
        unchanged = load_file(self.model)
        changed = [key for key, value in theirs.items() if not torch.equal(value, unchanged[key])]
        assert sorted(changed) == sorted(facts["diffusers_changed_keys"])
        named = {
            **{f"model/{key}": value[::32, ::16] for key, value in merged.items() if value.dim() == 2},
            **{f"lora/{key}": sliced(key, value) for key, value in sums.items()},
            **{f"lora_negative/{key}": sliced(key, value) for key, value in negative.items()},
            **{f"concat/{key}": sliced(key, value) for key, value in self.concatenated(squares).items()},
            **{f"diffusers/{key}": value[::32, ::32] for key, value in theirs.items() if value.dim() == 2},
        }
        return {name: named[name] for name in self.case["outputs"]}

    def concatenated(self, ratios: list[float]) -> dict[str, Tensor]:
        """The recorded matrices, which keep the first file's alpha, from ours, which keep the effect."""
        tensors, _ = self.merge(["one", "two"], ratios, "--concat")
        ranks = {key.split(".")[0]: len(value) for key, value in tensors.items() if "lora_down" in key}
        for name, rank in self.case["facts"]["concat_ranks"].items():
            assert ranks[name] == rank
        first, second = self.config["dims"]
        scale = torch.tensor([1.0] * first + [math.sqrt(second / first)] * second)
        return {
            f"{CONCAT}.lora_down.weight": tensors[f"{CONCAT}.lora_down.weight"] * scale[:, None],
            f"{CONCAT}.lora_up.weight": tensors[f"{CONCAT}.lora_up.weight"] * scale,
            f"{CONCAT}.alpha": tensors[f"{CONCAT}.alpha"] * first / (first + second),
        }

    def check_metadata(self, metadata: dict[str, str]) -> None:
        recorded = self.case["facts"]["lora_metadata"] | {"ss_network_module": "networks.lora_flux"}  # mended
        assert sorted(metadata) == sorted(recorded)
        for key, value in recorded.items():
            if value != "..." and key not in ("modelspec.implementation_version", "modelspec.title"):
                assert metadata[key] == value, key

    def merge(self, names: list[str], ratios: list[float], *words: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        target = self.folder / "merged.safetensors"
        models = [str(self.file(name)) for name in names]
        given = ["--models", *models, "--ratios", *map(str, ratios), "--save_to", str(target), *words]
        assert flux_merge_lora.main(given) == 0
        with safe_open(target, "pt") as file:
            return load_file(target), file.metadata()

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def sliced(key: str, value: Tensor) -> Tensor:
    if key.endswith(".alpha"):
        return value.reshape(1)
    return value[:, ::8] if "lora_down" in key else value[::16]
