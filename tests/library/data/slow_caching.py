"""Caches the images of a folder at two sizes with an encoder that takes its time; killed by a test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.data.caching import cache_latents
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.files.formats import LatentFormat

FORMAT = LatentFormat(channels=3, stride=8, suffix="_slow.npz", sizes_in_keys=True)
"""Both sizes of an image lie in one file, which is written twice."""
SECONDS_PER_IMAGE = 0.03


def data_of(folder: Path) -> TrainingSet:
    subset = SubsetSettings(folder, class_tokens="x")
    return load_training_set(
        DatasetConfig((DatasetSettings((64, 64), (subset,)), DatasetSettings((32, 32), (subset,))))
    )


def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 8)


def fill(folder: str, said: str) -> None:
    """Cache the images of `folder`; `said` is the file that tells `ready` and then how many were encoded."""
    count = 0

    def slowly(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        nonlocal count
        count += len(pixels)
        time.sleep(SECONDS_PER_IMAGE * len(pixels))
        return encode(pixels, seeds)

    torch.set_num_threads(1)
    data = data_of(Path(folder))
    Path(said).write_text("ready", encoding="utf-8")
    cache_latents(data, slowly, FORMAT, vae_id="slow", batch_size=2, to_disk=True)
    Path(said).write_text(str(count), encoding="utf-8")
