"""Images that are held out are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.items import ImageItem
from library.data.scan import chosen_for_validation

Image = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path, image: Image) -> Path:
    for number in range(10):
        image(tmp_path / "p" / f"{number}.png", (64, 64), number)
    return tmp_path / "p"


def load(*datasets: DatasetSettings) -> TrainingSet:
    return load_training_set(DatasetConfig(datasets))


def names(data: TrainingSet | None, dataset: int = 0) -> list[str]:
    assert data is not None
    return sorted(item.path.stem for item in data.datasets[dataset].items)


def subset(folder: Path, **changes: object) -> SubsetSettings:
    return SubsetSettings(folder, class_tokens="x", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "split", "num_held_out"),
    [(10, 0.1, 1), (10, 0.7, 7), (10, 0.01, 0), (3, 0.5, 1), (1, 0.5, 0), (1, 1.0, 1), (7, 1 / 3, 2), (0, 0.5, 0)],
)
def test_so_many_are_held_out(count: int, split: float, num_held_out: int) -> None:
    items = [ImageItem(Path(f"{i}.png"), "", 1, False, 0, (8, 8)) for i in range(count)]
    held_out = chosen_for_validation(items, split, seed=3)
    assert len(held_out) == num_held_out
    assert held_out == chosen_for_validation(items, split, seed=3)


def test_both_parts_together_are_the_folder_and_validation_has_no_repeats(pictures: Path) -> None:
    data = load(DatasetSettings((64, 64), (subset(pictures, num_repeats=3),), validation_split=0.3, validation_seed=1))
    train, held_out = names(data), names(data.validation)
    assert len(train) == 7 and len(held_out) == 3 and sorted(train + held_out) == [str(i) for i in range(10)]
    assert (data.num_train_images, data.num_batches) == (21, 21)
    assert data.validation is not None and data.validation.num_batches == 3
    assert data.validation.validation is None


def test_another_seed_holds_out_others(pictures: Path) -> None:
    found = {
        tuple(
            names(
                load(
                    DatasetSettings((64, 64), (subset(pictures),), validation_split=0.3, validation_seed=seed)
                ).validation
            )
        )
        for seed in range(5)
    }
    assert len(found) > 1


def test_two_resolutions_hold_out_the_same_images(pictures: Path) -> None:
    datasets = [DatasetSettings((s, s), (subset(pictures),), validation_split=0.2, validation_seed=4) for s in (64, 96)]
    data = load(*datasets)
    assert names(data, 0) == names(data, 1) and names(data.validation, 0) == names(data.validation, 1)
    assert data.validation is not None
    assert [item.bucket for d in data.validation.datasets for item in d.items[:1]] == [(64, 64), (96, 96)]


def test_what_one_dataset_holds_out_no_other_trains_on(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = DatasetSettings((64, 64), (subset(pictures),))
    splitting = DatasetSettings((96, 96), (subset(pictures),), validation_split=0.4)
    data = load(plain, splitting)
    assert len(names(data, 0)) == 6 and not set(names(data, 0)) & set(names(data.validation))
    assert (
        "4 images of" in caplog.text and "are not trained on here, since another dataset holds them out" in caplog.text
    )


def test_regularisation_images_are_never_held_out_and_match_what_is_left(
    tmp_path: Path, pictures: Path, image: Image
) -> None:
    for number in range(8):
        image(tmp_path / "r" / f"{number}.png", (64, 64))
    subsets = (subset(pictures), subset(tmp_path / "r", is_reg=True))
    data = load(DatasetSettings((64, 64), subsets, validation_split=0.5))
    assert sum(item.is_reg for item in data.datasets[0].items) == 5
    assert data.validation is not None and not any(item.is_reg for item in data.validation.datasets[0].items)


def test_a_dataset_may_be_held_out_whole_beside_another(tmp_path: Path, pictures: Path, image: Image) -> None:
    image(tmp_path / "v" / "held.png", (64, 64))
    data = load(
        DatasetSettings((64, 64), (subset(pictures),)),
        DatasetSettings((64, 64), (subset(tmp_path / "v"),), validation_split=1.0),
    )
    assert names(data.validation) == ["held"] and data.datasets[1].items == []
    assert len(data.epoch_batches(1, 1)) == data.num_batches == 10


def test_nothing_is_held_out_unless_asked(pictures: Path) -> None:
    assert load(DatasetSettings((64, 64), (subset(pictures),))).validation is None
