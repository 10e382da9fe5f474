from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.files.shards import open_model
from library.files.sources import Source
from library.files.weights import open_weights, save_safetensors


def write(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randn(4, 3) for name in "abcd"}
    for number, names in ((1, "ab"), (2, "cd")):
        file = folder / f"model-{number:05}-of-00002.safetensors"
        save_safetensors({name: tensors[name] for name in names}, file, {f"part{number}": "x"})
    return tensors


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", ""])
def test_several_files_are_one(tmp_path: Path, name: str) -> None:
    tensors = write(tmp_path)
    with open_model(tmp_path / name) as file:
        assert sorted(file.keys()) == list("abcd") and file.metadata == {"part1": "x", "part2": "x"}
        assert all(torch.equal(file.read(key), value) for key, value in tensors.items())
        assert file.shape("d") == (4, 3) and file.dtype("d") == torch.float32


def test_a_missing_and_a_broken_one_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is cut short"):
        open_model(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="of its 2 files these are missing: model-00002"):
        open_model(tmp_path / "model-00001-of-00002.safetensors")


def test_one_file_and_a_folder_with_one_file_are_opened_as_they_are(tmp_path: Path) -> None:
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.bin")
    for path in (tmp_path, tmp_path / "one.safetensors"):
        with open_model(path) as file:
            assert file.path.name == "one.safetensors", "safetensors go before pickled files"


def test_a_source_may_be_pieces_of_several_files(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    with open_model(tmp_path) as file, open_weights(tmp_path / "model-00001-of-00002.safetensors") as first:
        source = Source(file, "c", slice(2, None), (Source(first, "a"), Source(file, "c", slice(0, 2))))
        assert source.shape == (8, 3)
        assert torch.equal(source.read(), torch.cat([tensors["c"][2:], tensors["a"], tensors["c"][:2]]))
