"""A class of one's own as the training set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.custom import custom_training_set
from library.data.items import BatchRequest
from library.flags.dataset import DatasetFlags

DOCS = Path(__file__).resolve().parents[3] / "docs/dataset.md"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`write("name", "code")`: a module where the script is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))

    def module(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")

    return module


def test_the_example_of_the_page_makes_batches(
    write: Callable[[str, str], None], tmp_path: Path, image: Callable[..., Path]
) -> None:
    write("my_images", DOCS.read_text(encoding="utf-8").split("```python")[1].split("```")[0])
    image(tmp_path / "pictures" / "a.png", (64, 64))
    flags = DatasetFlags(dataset_class="my_images.Images", resolution=(64, 64), train_batch_size=2)
    data = custom_training_set(flags)
    batch = data[BatchRequest(0, data.epoch_batches(1, 1)[0].items, (1,), 1, 0, 1)]
    assert batch.pixels is not None and batch.pixels.shape == (1, 3, 64, 64)
    assert batch.captions == ["a"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Images", "expected package.module.Class"),
        ("no_such_module.Images", "No module named 'no_such_module'; is the module in this folder"),
        ("some_images.Others", "some_images has no class Others"),
        ("some_images.Images", "it gives a dict; expected a library.data.dataset.TrainingSet"),
    ],
)
def test_what_is_no_such_class_is_named(write: Callable[[str, str], None], name: str, expected: str) -> None:
    write("some_images", "def Images(flags):\n    return {}\n")
    with pytest.raises(ValueError, match=expected) as caught:
        custom_training_set(DatasetFlags(dataset_class=name))
    assert f"--dataset_class {name}" in str(caught.value)
