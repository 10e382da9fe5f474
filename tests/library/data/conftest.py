"""Small picture folders for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".png": "PNG"}


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """An image of noise; the ending of the name decides its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=FORMATS[path.suffix.lower()])
    return path


@pytest.fixture
def image() -> Callable[..., Path]:
    return write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine captioned images of three shapes."""
    for number in range(9):
        size = [(64, 64), (96, 64), (64, 96)][number % 3]
        write_image(tmp_path / "pictures" / f"{number}.png", size, number)
        text = f"subject {number}, red, round, small"
        (tmp_path / "pictures" / f"{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "pictures"


@pytest.fixture
def training_set(folder: Path) -> Callable[..., TrainingSet]:
    """`training_set(batch_size=2, flip_aug=True)`: the nine images with settings of one's own."""

    def load(captions: CaptionSettings | None = None, **changes: object) -> TrainingSet:
        own = {name: changes.pop(name) for name in list(changes) if name in SubsetSettings.__dataclass_fields__}
        subset = SubsetSettings(folder, captions=captions or CaptionSettings(shuffle_caption=True), **own)
        settings = {
            "resolution": (64, 64),
            "batch_size": 2,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 16,
        }
        dataset = DatasetSettings(subsets=(subset,), **(settings | changes))
        return load_training_set(DatasetConfig((dataset,)))

    return load
