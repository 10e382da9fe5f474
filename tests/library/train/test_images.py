"""Settings of a run -> its images, or the reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.flags.dataset import DatasetFlags
from library.flags.objective import LossFlags
from library.flags.settings import Settings
from library.models.sd.architecture import StableDiffusion
from library.train.images import images_of_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A dataset file with one image and its pair."""
    for folder in ("a", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "1.png")
    return tmp_path / "data.toml"


def load(file: Path, lines: str = "", *, masked_loss: bool = False, dataset: str = ""):
    folder = file.parent.as_posix()
    lines = lines.replace("@", folder)
    tables = f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\n"
    file.write_text(f'{tables}image_dir = "{folder}/a"\nclass_tokens = "x"\n{lines}', encoding="utf-8")
    settings = Settings.of(DatasetFlags(dataset_config=file), LossFlags(masked_loss=masked_loss, prior_loss_weight=0.5))
    return images_of_run(settings, StableDiffusion(settings), seed=3)


def test_the_settings_reach_the_images(file: Path) -> None:
    data = load(file, 'conditioning_data_dir = "@/c"', masked_loss=True)
    assert data.datasets[0].settings.masked_loss and data.prior_loss_weight == 0.5
    assert data.datasets[0].items[0].conditioning_path == file.parent / "c/1.png"
    assert data.datasets[0].settings.validation_seed == 3


def test_masks_that_nobody_would_use_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="would have no effect; expected --masked_loss"):
        load(file, 'conditioning_data_dir = "@/c"')


def test_a_masked_loss_without_masks_is_warned_of_and_masks_are_told(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load(file, masked_loss=True)
    assert "--masked_loss has no effect: no subset has masks" in caplog.text
    caplog.clear()
    load(file, "alpha_mask = true", masked_loss=True)
    assert "the alpha channel weighs the loss" in caplog.text and "no effect" not in caplog.text
    load(file, 'conditioning_data_dir = "@/c"', masked_loss=True)
    assert "masks in" in caplog.text


def test_images_are_held_out_as_the_file_says(file: Path) -> None:
    Image.new("RGB", (64, 64)).save(file.parent / "a/2.png")
    validation = load(file, dataset="validation_split = 0.5").validation
    assert validation is not None and validation.num_batches == 1
