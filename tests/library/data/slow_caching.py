"""Caches the images of a folder at two sizes with an encoder that takes its time; killed by a test."""

from __future__ import annotations

import sys
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


def main(folder: str) -> None:
    count = 0

    def slowly(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        nonlocal count
        count += len(pixels)
        time.sleep(SECONDS_PER_IMAGE * len(pixels))
        return encode(pixels, seeds)

    torch.set_num_threads(1)
    data = data_of(Path(folder))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    cache_latents(data, slowly, FORMAT, vae_id="slow", batch_size=2, to_disk=True)
    sys.stdout.write(f"{count}\n")


if __name__ == "__main__":
    main(sys.argv[1])
