from __future__ import annotations

from pathlib import Path

import torch

from library.files.sources import Source
from library.files.weight_id import weight_id
from library.files.weights import open_weights, save_safetensors


def named(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_safetensors(tensors, path)
    with open_weights(path) as file:
        return weight_id({key: Source(file, key) for key in file.keys()}, lambda name: name != "left_out")


def test_it_follows_the_small_weights_and_not_the_number_format(tmp_path: Path) -> None:
    tensors = {"norm": torch.tensor([1.0, 2.0]), "left_out": torch.zeros(2), "big": torch.zeros(2, 2)}
    first = named(tmp_path / "a.safetensors", tensors)
    assert len(first) == 16
    assert named(tmp_path / "b.safetensors", {key: value.half() for key, value in tensors.items()}) == first
    assert named(tmp_path / "c.safetensors", tensors | {"left_out": torch.ones(2), "big": torch.ones(2, 2)}) == first
    assert named(tmp_path / "d.safetensors", tensors | {"norm": torch.tensor([1.0, 2.5])}) != first
