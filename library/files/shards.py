"""Models that lie in several files: `name-00001-of-00003.safetensors` and so on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from library.files.weights import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, WeightFile, describe_keys, open_weights

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def open_model(path: str | os.PathLike[str]) -> WeightFile:
    """Open the weights at `path`: a file, any one of several that belong together, or a folder that holds these.

    Raises:
        FileNotFoundError: there is nothing, or one of several files is missing.
        ValueError: a file cannot be read, or a folder holds no weights, or those of more than one model.
    """
    place = Path(path)
    first = _only_model(place) if place.is_dir() else place
    match = SHARD.fullmatch(first.name)
    if match is None:
        return open_weights(first)
    names = [f"{match['stem']}-{n:05}-of-{match['count']}{match['suffix']}" for n in range(1, int(match["count"]) + 1)]
    missing = [name for name in names if not (first.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{first}: of its {len(names)} files these are missing: {describe_keys(missing)}")
    return ShardedFile(first.parent, names)


class ShardedFile(WeightFile):
    """Several files as one; `path` is the first of them."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.path = folder / names[0]
        self.metadata = {}
        self._owners: dict[str, WeightFile] = {}
        self._files: list[WeightFile] = []
        try:
            for name in names:
                file = open_weights(folder / name)
                self._files.append(file)
                self.metadata |= file.metadata
                self._owners |= dict.fromkeys(file.keys(), file)
        except BaseException:
            self.close()
            raise

    def keys(self) -> list[str]:
        return list(self._owners)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._owners[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._owners[key].dtype(key)

    def read(self, key: str) -> Tensor:
        return self._owners[key].read(key)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _only_model(folder: Path) -> Path:
    """The file of weights in `folder`, or the first of several that belong together; safetensors come first."""
    for suffixes in (SAFETENSORS_SUFFIXES, PICKLE_SUFFIXES):
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.is_file())
        models = {match["stem"] if (match := SHARD.fullmatch(file.name)) else file.stem for file in found}
        if len(models) == 1:
            return found[0]
        if models:
            raise ValueError(f"{folder} holds several files of weights ({describe_keys(models)}): name one of them")
    raise ValueError(f"{folder} holds no weights: {', '.join(SAFETENSORS_SUFFIXES)} are looked for")
