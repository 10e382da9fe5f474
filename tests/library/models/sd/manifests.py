"""Published files by their lists of keys and shapes, without the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from library.files.sources import Source, check_sources
from library.files.weights import WeightFile
from library.models import parts
from library.models.text import clip
from library.models.vae import sd as vae_module


class ManifestFile(WeightFile):
    """A file whose tensors have shapes and no values."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = {}
        self.manifest = manifest

    def keys(self) -> list[str]:
        return list(self.manifest)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.manifest[key][0])

    def dtype(self, key: str) -> torch.dtype:
        return getattr(torch, self.manifest[key][1])

    def read(self, key: str) -> Tensor:
        return torch.empty(self.shape(key), dtype=self.dtype(key), device="meta")

    def close(self) -> None:
        pass


def manifest(facts: Path, name: str, optional: bool = True) -> dict[str, Any]:
    """The keys of `name`, with those that are only in some published files."""
    content = json.loads((facts / "checkpoints" / f"{name}.json").read_text(encoding="utf-8"))
    return content["keys"] | (content.get("optional_keys", {}) if optional else {})


def without_weights(monkeypatch: pytest.MonkeyPatch, checkpoint: ModuleType) -> dict[Path, dict[str, Any]]:
    """Path -> manifest of the files that the loaders will find; loading stops at the check that all weights fit."""
    files: dict[Path, dict[str, Any]] = {}

    def only_check(module: torch.nn.Module, sources: Mapping[str, Source], *_: Any) -> None:
        check_sources(module.state_dict(), sources)

    for place in (checkpoint, clip, vae_module):
        monkeypatch.setattr(place, "fill_module", only_check)
    monkeypatch.setattr(parts, "open_weights", lambda path: ManifestFile(path, files[path]))
    return files
