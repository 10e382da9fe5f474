"""Second images go with the image of their stem, and nothing is left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set

Image = Callable[..., Path]
SIZES = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


@pytest.fixture
def load(tmp_path: Path, image: Image) -> Callable[..., TrainingSet]:
    """Images in `a`, their pairs in `c`; each argument lists names, or names with sizes."""

    def load_from(images: Any, pairs: Any, **settings: Any) -> TrainingSet:
        for folder, names in (("a", images), ("c", pairs)):
            (tmp_path / folder).mkdir()
            for name in names:
                image(tmp_path / folder / name, names[name] if isinstance(names, dict) else (64, 48))
        subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "c")
        return load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,), **settings),)))

    return load_from


def test_pairs_have_one_stem_whatever_they_end_in(load: Callable[..., TrainingSet]) -> None:
    data = load(["1.png", "2.jpg"], ["1.webp", "2.jpg"])
    names = {i.path.name: i.conditioning_path.name for i in data.datasets[0].items if i.conditioning_path}
    assert names == {"1.png": "1.webp", "2.jpg": "2.jpg"}


def test_two_images_of_one_stem_have_pairs_of_their_whole_names(load: Callable[..., TrainingSet]) -> None:
    data = load(["1.png", "1.jpg"], ["1.png", "1.jpg"])
    assert all(i.conditioning_path and i.conditioning_path.name == i.path.name for i in data.datasets[0].items)


def test_everything_without_a_pair_is_named(load: Callable[..., TrainingSet], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load(["1.png", "2.png", "3.png"], ["1.png", "3.png", "3.jpg", "9.png"])
    message = str(caught.value)
    assert "3 image(s) and conditioning image(s) do not go together" in message
    assert f"{tmp_path / 'c' / '3.jpg'}: 3.png is used" in message
    assert f"{tmp_path / 'a' / '2.png'}: no conditioning image; expected {tmp_path / 'c' / '2'}" in message
    assert f"{tmp_path / 'c' / '9.png'}: no image of this stem in {tmp_path / 'a'}" in message


def test_a_choice_between_two_is_left_to_the_user(load: Callable[..., TrainingSet]) -> None:
    with pytest.raises(
        ValueError, match=r"a.1\.webp: 1\.jpg and 1\.png in .* may be meant; expected one image of each stem"
    ):
        load(["1.webp"], ["1.jpg", "1.png"])


def test_with_buckets_both_have_one_size(load: Callable[..., TrainingSet]) -> None:
    with pytest.raises(ValueError, match=r"c.1\.png: 32x24 pixels, but 1\.png has 64x48; expected the same size"):
        load(["1.png"], {"1.png": (32, 24)}, **SIZES)


def test_without_buckets_the_second_is_scaled_to_the_first(
    load: Callable[..., TrainingSet], caplog: pytest.LogCaptureFixture
) -> None:
    assert load(["1.png", "2.png"], {"1.png": (32, 24), "2.png": (48, 48)}).num_batches == 2
    assert "1 images have another shape than their images and are distorted to fit" in caplog.text


def test_a_broken_pair_is_named(load: Callable[..., TrainingSet], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    subset = SubsetSettings(tmp_path / "a", class_tokens="x", conditioning_data_dir=tmp_path / "gone")
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"conditioning_data_dir .*gone: there is no such folder"):
        load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,)),)))


def test_a_pair_that_is_no_image_is_listed(load: Callable[..., TrainingSet], tmp_path: Path, image: Image) -> None:
    image(tmp_path / "x" / "1.png", (64, 48))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "1.png").write_bytes(b"no image")
    subset = SubsetSettings(tmp_path / "x", class_tokens="x", conditioning_data_dir=tmp_path / "y")
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read(.|\n)*y.1\.png: not an image"):
        load_training_set(DatasetConfig((DatasetSettings((64, 64), (subset,)),)))
