from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.files.views import part_of, with_scales
from library.files.weights import open_weights, save_safetensors


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_safetensors(tensors, folder / "file.safetensors")
    return folder / "file.safetensors"


def test_a_part_has_its_own_keys(tmp_path: Path) -> None:
    path = written(tmp_path, {"vae.a.weight": torch.arange(6.0).view(2, 3), "model.b": torch.zeros(1)})
    with open_weights(path) as file:
        part = part_of(file, "vae.")
        assert part.keys() == ["a.weight"] and part.shape("a.weight") == (2, 3) and part.path == path
        assert part.dtype("a.weight") == torch.float32 and part.read("a.weight")[1, 2] == 5
        assert part_of(file, "text_encoders.") is file


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_scales_are_multiplied_out_for_each_tensor_or_row(tmp_path: Path, end: str) -> None:
    values = torch.tensor([[1.0, -2.0], [4.0, 8.0]]).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": values,
        f"a.{end}": torch.tensor(0.5),
        "a.bias": torch.ones(2),
        "b.weight": values.clone(),
        f"b.{end}": torch.tensor([1.0, 10.0]),
        "b.input_scale": torch.ones(()),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    with open_weights(written(tmp_path, tensors)) as file:
        view = with_scales(file)
        assert sorted(view.keys()) == ["a.bias", "a.weight", "b.weight"]
        assert view.dtype("a.weight") == torch.float32 and view.shape("a.weight") == (2, 2)
        assert view.read("a.weight").tolist() == [[0.5, -1.0], [2.0, 4.0]]
        assert view.read("b.weight").tolist() == [[1.0, -2.0], [40.0, 80.0]]
        assert view.read("a.bias").tolist() == [1.0, 1.0]


def test_a_file_without_scales_is_seen_as_it_is(tmp_path: Path) -> None:
    with open_weights(written(tmp_path, {"a.weight": torch.zeros(1)})) as file:
        assert with_scales(file) is file


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.zeros(4, 4), "a.scale_weight": torch.zeros(4, 2, 1)}, r"shape \[4, 2, 1\]: only float8"),
        ({"b.weight": torch.zeros(4, 4), "a.scale_weight": torch.zeros(1)}, "a.scale_weight is there, but the weight"),
    ],
)
def test_other_scales_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with open_weights(written(tmp_path, tensors)) as file, pytest.raises(ValueError, match=message):
        with_scales(file)
