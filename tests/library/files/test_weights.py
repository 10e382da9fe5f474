"""Weight files are read tensor by tensor, and every kind of broken one is named."""

from __future__ import annotations

import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.files.sources import Source, fill_module
from library.files.weights import WeightFile, open_weights, save_safetensors


class Explosive:
    def __reduce__(self) -> Any:
        return print, ("code in a weights file was run",)


def some_tensors() -> dict[str, Tensor]:
    return {
        "half": torch.randn(3, 5, dtype=torch.float16),
        "brain": torch.randn(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(7),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "yes": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
    }


def test_our_reader_and_the_published_one_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some_tensors(), path, {"made": "by safetensors"})
    with open_weights(path) as file:
        assert file.metadata == {"made": "by safetensors"}
        assert sorted(file.keys()) == sorted(some_tensors())
        for key, expected in load_file(path).items():
            value = file.read(key)
            assert (file.shape(key), file.dtype(key)) == (tuple(expected.shape), expected.dtype)
            assert value.dtype == expected.dtype and value.shape == expected.shape
            assert torch.equal(value.float(), expected.float())


def test_what_we_write_can_be_read_by_the_published_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3)
    save_safetensors({"transposed": matrix.t()}, path, {"ss_x": "1"})
    assert torch.equal(load_file(path)["transposed"], matrix.t())
    with open_weights(path) as file:
        assert file.metadata == {"ss_x": "1"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickled_file_is_read_with_or_without_a_nested_state_dict(tmp_path: Path, zipped: bool, nested: bool) -> None:
    path = tmp_path / "a.ckpt"
    whole = torch.randn(6, 5, dtype=torch.float16)
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.arange(4),
        "part": whole[2:4],
        "transposed": whole.t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 2),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    content = {"state_dict": tensors, "global_step": 7} if nested else tensors
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with open_weights(path) as file:
        assert file.keys() == list(tensors)
        assert file.shape("a") == (2, 3) and file.dtype("b") == torch.int64
        for key, expected in tensors.items():
            assert torch.equal(file.read(key), expected), key


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickled_file_is_not_run(tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"a": torch.zeros(1), "b": Explosive()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.ckpt holds pickled code .*save_file"):
        open_weights(path)
    assert capsys.readouterr().out == ""


def test_a_pickled_file_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match=r"a\.pt holds no named tensors"):
        open_weights(path)


def whole_file(folder: Path) -> bytes:
    path = folder / "whole.safetensors"
    save_file({"a": torch.zeros(8, 8)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "cut short: its tensors need"),
        (lambda data: data[:30], "cut short: its header alone needs .*; copy or download it again"),
        (lambda data: data[:5], "not a safetensors file, or is cut short; copy or download it again"),
        (lambda data: b"", "is empty; copy or download it again"),
        (lambda data: b"<!DOCTYPE html><html>", "a page of text that came in place of the file"),
        (lambda data: b'{"error": "Unauthorized"}', "a page of text that came in place of the file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda data: b"PK\x03\x04" + data, "pickled file with the wrong extension"),
        (lambda data: struct.pack("<Q", 4) + b"{{{{", "header cannot be read"),
        (lambda data: data.replace(b"[8,8]", b"[8,9]"), "header cannot be read"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "header cannot be read"),
    ],
)
def test_a_broken_safetensors_file_is_named_with_its_fault(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(change(whole_file(tmp_path)))
    with pytest.raises(ValueError, match=message) as error:
        open_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file_that_is_cut_short_is_named(tmp_path: Path, keep: int, zipped: bool) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"a": torch.zeros(8, 8)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.ckpt is not a file of weights, or is cut short; copy or download"):
        open_weights(path)


def test_a_file_that_is_not_there_and_a_folder_are_different_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.safetensors"):
        open_weights(tmp_path / "nope.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        open_weights(tmp_path)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 1)
        self.linear = nn.Linear(6, 2, bias=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def small_on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def small_weights() -> dict[str, Tensor]:
    return {
        "conv.weight": torch.randn(6, 4, 1, 1),
        "conv.bias": torch.randn(6),
        "linear.weight": torch.randn(2, 6),
        "count": torch.tensor(9),
    }


def opened(path: Path, tensors: dict[str, Tensor]) -> WeightFile:
    save_safetensors(tensors, path)
    return open_weights(path)


def sources_of(file: WeightFile) -> dict[str, Source]:
    return {key: Source(file, key) for key in file.keys()}


def test_a_module_on_meta_gets_its_weights_in_the_wanted_dtype(tmp_path: Path) -> None:
    tensors = small_weights()
    module = small_on_meta()
    with opened(tmp_path / "a.safetensors", tensors) as file:
        fill_module(module, sources_of(file), torch.bfloat16, "cpu")
    assert module.conv.weight.dtype == torch.bfloat16
    assert torch.equal(module.conv.weight, tensors["conv.weight"].bfloat16())
    assert isinstance(module.conv.weight, nn.Parameter) and not module.conv.weight.requires_grad
    assert module.get_buffer("count").dtype == torch.int64 and int(module.get_buffer("count")) == 9


def test_weights_of_1x1_convolutions_and_linear_layers_fill_each_other(tmp_path: Path) -> None:
    tensors = small_weights()
    swapped = tensors | {
        "conv.weight": tensors["conv.weight"].reshape(6, 4),
        "linear.weight": tensors["linear.weight"].reshape(2, 6, 1, 1),
    }
    module = small_on_meta()
    with opened(tmp_path / "a.safetensors", swapped) as file:
        fill_module(module, sources_of(file), torch.float32, "cpu")
    assert torch.equal(module.conv.weight, tensors["conv.weight"])
    assert torch.equal(module.linear.weight, tensors["linear.weight"])


def test_each_weight_can_be_changed_while_it_is_read(tmp_path: Path) -> None:
    module = small_on_meta()
    seen = {}

    def quantise(name: str, value: Tensor) -> Tensor:
        seen[name] = value.dtype
        return value.to(torch.float8_e4m3fn) if name == "linear.weight" else value

    with opened(tmp_path / "a.safetensors", small_weights()) as file:
        fill_module(module, sources_of(file), torch.float16, "cpu", quantise)
    assert seen["linear.weight"] == torch.float32  # as stored
    assert module.linear.weight.dtype == torch.float8_e4m3fn
    assert module.conv.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("conv.bias", {}, "1 weights are missing: conv.bias"),
        ("", {"conv.extra": torch.zeros(1)}, "1 weights do not belong to this model: conv.extra"),
        ("", {"conv.bias": torch.zeros(5)}, r"conv.bias has shape \[5\], expected \[6\]"),
        ("", {"conv.weight": torch.zeros(6, 4, 3, 3)}, r"conv.weight has shape \[6, 4, 3, 3\], expected"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_keys(
    tmp_path: Path, remove: str, add: dict[str, Tensor], message: str
) -> None:
    tensors = {key: value for key, value in small_weights().items() if key != remove} | add
    with (
        opened(tmp_path / "odd.safetensors", tensors) as file,
        pytest.raises(ValueError, match=rf"odd\.safetensors: .*{message}"),
    ):
        fill_module(small_on_meta(), sources_of(file), torch.float32, "cpu")


class CountingFile(WeightFile):
    """Tensors made on demand; knows how many of those it gave away are still held by somebody."""

    def __init__(self, count: int) -> None:
        self.path = Path("counting.safetensors")
        self.metadata = {}
        self.count = count
        self.alive = 0
        self.most_alive = 0

    def keys(self) -> list[str]:
        return [f"{i}.weight" for i in range(self.count)]

    def shape(self, key: str) -> tuple[int, ...]:
        return (8, 8)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def read(self, key: str) -> Tensor:
        # Whoever holds a view of the tensor holds the array.
        memory = np.ones((8, 8), dtype=np.float32)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(memory, self.release)
        return torch.from_numpy(memory)

    def release(self) -> None:
        self.alive -= 1

    def close(self) -> None:
        pass


def test_one_tensor_at_a_time_is_held_besides_the_model() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(20)))
    file = CountingFile(20)
    fill_module(module, sources_of(file), torch.float16, "cpu")
    assert file.most_alive == 1
    assert sum(p.numel() for p in module.parameters()) == 20 * 64
