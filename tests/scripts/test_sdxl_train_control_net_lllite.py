"""sdxl_train_control_net_lllite.py as it is started: the command of its page, with and without caches."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from demo_sdxl_folder import SdxlDemo
from library.models.sdxl.architecture import Sdxl
from library.train.control_trainer import ControlTrainer
from networks.control_net_lllite import sizes_in_file
from tests.clients.launcher import ONE_PROCESS, said_by
from tests.clients.lllite_training import LlliteRuns, SmallControlTrainer, lllite_settings
from tests.clients.training_db import fresh_accelerate

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "sdxl_train_control_net_lllite.py"
REPLACED = {
    "--xformers": "--sdpa",
    "--optimizer_type=AdamW8bit": "--optimizer_type=AdamW",
    "--max_train_epochs=12": "--max_train_epochs=2",
}
"""What needs a GPU, or hours, and what stands in its place."""


@pytest.fixture(autouse=True)
def _one_precision_a_test() -> None:
    fresh_accelerate()


def command(demo: SdxlDemo, folder: Path) -> list[str]:
    """The command of the page, without `accelerate launch`, for the small model."""
    page = (ROOT / "docs" / "sdxl_train_control_net_lllite.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^accelerate launch (.*?[^\\])$", page, flags=re.MULTILINE | re.DOTALL)
    # The caches lie beside the images, of which the demo's are for all tests.
    runs = LlliteRuns(demo, folder)
    images = folder / "images"
    images.mkdir()
    for path in sorted(demo.pictures.iterdir())[:8]:
        (images / path.name).write_bytes(path.read_bytes())
    runs.dataset()
    edges = folder / "edges"
    for path in edges.iterdir():
        if not (images / path.name).exists():
            path.unlink()
    data = runs.dataset().read_text(encoding="utf-8").replace(demo.pictures.as_posix(), images.as_posix())
    (folder / "pairs.toml").write_text(data, encoding="utf-8")
    paths = {
        "--pretrained_model_name_or_path=model.safetensors": f"--pretrained_model_name_or_path={demo.checkpoint}",
        "--dataset_config=dataset.toml": f"--dataset_config={folder / 'pairs.toml'}",
        "--output_dir=output": f"--output_dir={folder / 'out'}",
    }
    words = found.replace("\\\n", " ").split()
    words = [(paths | REPLACED).get(word, word) for word in words[words.index(SCRIPT) :]]
    return [*words, f"--tokenizer_cache_dir={demo.tokenizers}", "--max_data_loader_n_workers=0"]


def test_the_command_of_the_page_runs_under_accelerate(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    words = command(small_sdxl, tmp_path)
    said_by(*ONE_PROCESS, *words)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "canny-000001.safetensors",
        "canny.safetensors",
    ]
    assert sizes_in_file(tmp_path / "out" / "canny.safetensors") == (32, 64)
    assert len(list((tmp_path / "images").glob("*_sdxl.npz"))) == 4


def test_the_command_of_the_page_runs_without_caches(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    words = [word for word in command(small_sdxl, tmp_path)[1:] if not word.startswith("--cache")]
    trainer = SmallControlTrainer(lllite_settings(*words, "--max_train_epochs=1"))
    assert trainer.run() == 0
    assert len(trainer.models.text_encoders) == 2 and trainer.models.vae is not None
    assert (tmp_path / "out" / "canny.safetensors").exists()


@pytest.mark.parametrize("name", ["__mp_main__", "sdxl_train_control_net_lllite"])
def test_a_worker_process_may_run_the_script_without_starting_a_training(name: str) -> None:
    found = runpy.run_path(str(ROOT / SCRIPT), run_name=name)
    trainer = found["SdxlControlTrainer"]
    assert issubclass(trainer, ControlTrainer) and trainer.architecture is Sdxl
    assert "settings" not in found
