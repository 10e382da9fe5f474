"""A file written tensor by tensor is the file that safetensors would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.files.streaming import stream_safetensors

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.weight": torch.arange(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "ids": torch.arange(3),
    "fp8": torch.ones(5).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}


def on_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def test_the_bytes_are_those_of_the_format_s_own_writer(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_file(TENSORS, theirs, {"note": "é"})
    asked: list[str] = []
    stream_safetensors(on_meta(TENSORS), lambda name: asked.append(name) or TENSORS[name], ours, {"note": "é"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(asked) == sorted(TENSORS)


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    save_file({"old": torch.ones(1)}, target)

    def value(name: str) -> Tensor:
        if name == "b.weight":
            raise ValueError("the source is cut short")
        return TENSORS[name]

    with pytest.raises(ValueError, match="cut short"):
        stream_safetensors(on_meta(TENSORS), value, target)
    assert list(load_file(target)) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_pickled_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.ckpt: only a \.safetensors file"):
        stream_safetensors({}, lambda _: torch.ones(1), tmp_path / "model.ckpt")
