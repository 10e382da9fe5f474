"""LoRA files of every layout are read as pairs, and broken ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.files.hashing import precalculate_safetensors_hashes
from networks.core.lora_file import PAIR_ENDS, LowRankPair, read_lora, write_lora


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path, metadata)
    return path


def matrices(rank: int = 2, name: str = "x", ends: tuple[str, str] = PAIR_ENDS[0]) -> dict[str, Tensor]:
    return {f"{name}.{ends[0]}": torch.ones(rank, 5), f"{name}.{ends[1]}": torch.ones(6, rank)}


@pytest.mark.parametrize("ends", PAIR_ENDS)
def test_every_layout_is_read(tmp_path: Path, ends: tuple[str, str]) -> None:
    file = read_lora(saved(tmp_path, {**matrices(2, "a.b", ends), "a.b.alpha": torch.tensor(1.0)}))
    pair = file.pairs["a.b"]
    assert (pair.rank, pair.alpha, pair.scale) == (2, 1.0, 0.5)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_alpha_is_the_rank_where_there_is_none(tmp_path: Path, alpha: float | None) -> None:
    extra = {} if alpha is None else {"x.alpha": torch.tensor(alpha)}
    assert read_lora(saved(tmp_path, {**matrices(3), **extra})).pairs["x"].alpha == 3.0


def test_peft_settings_in_the_metadata_say_alpha(tmp_path: Path) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"b.q": 2}}
    tensors = {key: value for name in ("transformer.a.k", "transformer.b.q") for key, value in
               matrices(4, name, PAIR_ENDS[1]).items()}  # fmt: skip
    file = read_lora(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert {name: pair.alpha for name, pair in file.pairs.items()} == {"transformer.a.k": 8.0, "transformer.b.q": 2.0}
    settings["transformer.use_rslora"] = True
    file = read_lora(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert file.pairs["transformer.a.k"].alpha == 16.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.lora_down.weight": torch.ones(2, 5)}, "lack the other half of their pair: x.lora_down.weight"),
        ({**matrices(2), "x.lora_up.weight": torch.ones(6, 3)}, "their ranks, first and second number, must be equal"),
        ({**matrices(2), "y.hada_w1_a": torch.ones(2, 2)}, "1 keys are no part of a LoRA, such as y.hada_w1_a"),
        ({**matrices(2), "x.dora_scale": torch.ones(6)}, "no part of a LoRA, such as x.dora_scale"),
        ({**matrices(2), "x.alpha": torch.tensor(float("nan"))}, "x.alpha is nan; the file is damaged"),
        ({"model.diffusion_model.a.weight": torch.ones(2)}, "no whole models"),
        ({}, "there is no LoRA in it"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lora(saved(tmp_path, tensors))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, matrices(64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"lora\.safetensors is cut short"):
        read_lora(path)


def test_hashes_are_of_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    pair = LowRankPair(torch.ones(2, 5), torch.ones(6, 2), 1.0)
    write_lora({"x": pair}, path, {"ss_note": "kept", "sshs_model_hash": "of another"}, torch.float16)
    tensors = load_file(path)
    assert {str(value.dtype) for value in tensors.values()} == {"torch.float16"}
    assert tensors["x.alpha"].shape == ()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model_hash, legacy = precalculate_safetensors_hashes(tensors, {"ss_note": "kept"})
    assert metadata == {"ss_note": "kept", "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy}
