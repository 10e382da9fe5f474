"""What --debug_dataset says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.data.config import CaptionSettings, DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.debug import described_batches


def test_every_image_stands_in_it_with_its_caption_as_rendered(training_set: Callable[..., TrainingSet]) -> None:
    data = training_set(captions=CaptionSettings(caption_prefix="photo of"), batch_size=2)
    texts = list(described_batches(data, seed=3, total_steps=10))
    assert len(texts) == data.num_batches == 6
    assert texts[0].startswith("batch 1 of 6: dataset 1, ") and texts[5].startswith("batch 6 of 6")
    together = "\n".join(texts)
    for item in data.datasets[0].items:
        assert together.count(f"{item.path}: {item.size[0]}x{item.size[1]} scaled to") == 1
        assert f"'photo of subject {item.path.stem}, red, round, small'" in together


def test_masks_and_pairs_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    for folder in ("a", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64), (51, 0, 0)).save(tmp_path / folder / "1.png")
    subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "c")
    data = load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,), masked_loss=True),)))
    before = sorted(tmp_path.rglob("*"))
    (text,) = described_batches(data, seed=1, total_steps=1)
    assert f"with {tmp_path / 'c' / '1.png'}" in text and "the mask keeps 20%" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_that_cannot_be_read_is_named(training_set: Callable[..., TrainingSet], folder: Path) -> None:
    data = training_set()
    (folder / "4.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"4\.png cannot be read"):
        list(described_batches(data, seed=1, total_steps=1))
