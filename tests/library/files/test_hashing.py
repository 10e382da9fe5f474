from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from library.files.hashing import BackgroundHash, FileHashes, model_hash, precalculate_safetensors_hashes, sha256_of
from tests.parity import recipe

FACTS = json.loads((Path(__file__).parents[2] / "facts/metadata/hashes_and_modelspec.json").read_text(encoding="utf-8"))


def recorded_tensors(name: str, dtype: str) -> dict[str, Tensor]:
    tensors = recipe.state_dict(FACTS["manifest"][name], FACTS["seed"])
    (alpha,) = FACTS["manifest"]["extra"]
    tensors[alpha] = torch.tensor(2.0)
    return {key: value.to(getattr(torch, dtype)) for key, value in tensors.items()}


@pytest.mark.parametrize("row", FACTS["hashes"], ids=lambda row: f"{row['tensors']}-{row['dtype']}")
def test_the_recorded_hashes_come_out(row: dict) -> None:
    tensors = recorded_tensors(row["tensors"], row["dtype"])
    hashes = precalculate_safetensors_hashes(tensors, row["metadata"])
    assert hashes == (row["sshs_model_hash"], row["sshs_legacy_hash"])


def test_the_hashes_are_those_of_the_file_that_safetensors_writes() -> None:
    torch.manual_seed(0)
    tensors = {
        "small.é": torch.zeros((), dtype=torch.int64),
        "whole": torch.randn(700, 300),
        "half": torch.randn(700, 300).to(torch.float16),
        "brain": torch.randn(500, 300).to(torch.bfloat16),
        "turned": torch.randn(30, 500).t(),
        "eight": torch.randn(70).to(torch.float8_e4m3fn),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "yes": torch.tensor([True, False]),
    }
    metadata = {"ss_title": 'été "1"\n\x7f\\', "ss_b": "x" * 1001, "other": "not hashed"}
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    written = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}, metadata=kept)
    header = 8 + struct.unpack("<Q", written[:8])[0]
    assert len(written) > 0x110000
    expected = hashlib.sha256(written[header:]).hexdigest(), hashlib.sha256(written[0x100000:0x110000]).hexdigest()[:8]
    assert precalculate_safetensors_hashes(tensors, metadata) == expected


def test_a_file_has_a_legacy_hash_and_a_whole_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4400
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert model_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_short_file_has_the_legacy_hash_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"abc")
    assert model_hash(path) == "e3b0c442"


def test_no_file_and_a_folder_have_words_for_hashes(tmp_path: Path) -> None:
    assert (model_hash(tmp_path / "none"), sha256_of(tmp_path / "none")) == ("NOFILE", "NOFILE")
    assert (model_hash(tmp_path), sha256_of(tmp_path)) == ("IsADirectory", "IsADirectory")
    assert BackgroundHash(tmp_path).result() == FileHashes("IsADirectory", "IsADirectory")


def test_the_background_finds_what_the_foreground_finds(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 0x108000)
    background = BackgroundHash(path)
    assert background.result() == FileHashes(model_hash(path), sha256_of(path))
    assert background.result() == background.result()


def test_a_file_that_cannot_be_read_is_named_when_the_hash_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")

    def broken(self: Path, mode: str) -> None:
        raise PermissionError("no access")

    monkeypatch.setattr(Path, "open", broken)
    background = BackgroundHash(path)
    with pytest.raises(OSError, match=r"model\.safetensors could not be read: no access"):
        background.result()
