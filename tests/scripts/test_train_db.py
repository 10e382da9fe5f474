"""train_db.py as it is started: the commands of its page, 2.x, runs that are killed while they save."""

from __future__ import annotations

import os
import re
import runpy
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo_folder import DemoFolder
from demo_pictures import words as demo_words
from demo_tokenizer import write_tokenizer
from library.files.weights import save_safetensors
from library.models.sd.architecture import StableDiffusion
from library.models.sd.checkpoint import load_text_encoder, load_unet
from library.models.sd.model_writer import FOLDER_KINDS
from library.train.dreambooth_trainer import DreamBoothTrainer
from tests.clients.launcher import ONE_PROCESS, said_by
from tests.clients.training_db import ModelRuns, SmallModelTrainer, fresh_accelerate
from tests.library.models.sd.test_model_writer import file_of_2x, path_of, trained, writer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
REPLACED = {
    "--xformers": "--sdpa",
    "--mixed_precision=fp16": "--mixed_precision=bf16",
    "--optimizer_type=AdamW8bit": "--optimizer_type=AdamW",
    "--max_train_steps=1600": "--max_train_steps=2",
    "--resolution=512": "--resolution=64",
}
"""What needs a GPU, or hours, and what stands in its place."""


@pytest.fixture(autouse=True)
def _one_precision_a_test() -> None:
    fresh_accelerate()


def commands() -> list[list[str]]:
    """The commands of the page, without `accelerate launch`."""
    page = (ROOT / "docs" / "train_db.md").read_text(encoding="utf-8")
    found = re.findall(r"^accelerate launch (.*?[^\\])$", page, flags=re.MULTILINE | re.DOTALL)
    return [command.replace("\\\n", " ").split() for command in found]


def replaced(words: list[str], folder: Path, demo: DemoFolder) -> list[str]:
    """The words of a command with paths of the small model and what this machine can do."""
    images = (folder / "images" / "1_star", folder / "reg" / "1_thing")
    for place, names in zip(images, ("*star.png", "*circle.png"), strict=True):
        place.mkdir(parents=True)
        for picture in sorted(demo.pictures.glob(names))[:2]:
            (place / picture.name).write_bytes(picture.read_bytes())
    paths = {
        "--pretrained_model_name_or_path=model.safetensors": f"--pretrained_model_name_or_path={demo.checkpoint}",
        "--dataset_config=dataset.toml": f"--dataset_config={demo.dataset}",
        "--train_data_dir=images": f"--train_data_dir={folder / 'images'}",
        "--reg_data_dir=regularisation": f"--reg_data_dir={folder / 'reg'}",
        "--output_dir=output": f"--output_dir={folder / 'out'}",
    }
    return [(paths | REPLACED).get(word, word) for word in words] + [f"--tokenizer_cache_dir={demo.tokenizers}"]


def test_the_command_of_the_page_runs_under_accelerate_and_leaves_a_whole_model(
    small_sd: DemoFolder, tmp_path: Path
) -> None:
    first, with_folders = commands()
    assert "train_db.py" in first and "train_db.py" in with_folders
    words = replaced(with_folders, tmp_path, small_sd)
    assert "num reg images               2" in said_by(*ONE_PROCESS, *words)
    unet = load_unet(tmp_path / "out" / "my_model.ckpt", False, torch.float32, CPU)
    before = load_unet(small_sd.checkpoint, False, torch.float32, CPU)
    assert not torch.equal(unet.conv_in.weight, before.conv_in.weight)


@pytest.mark.parametrize("cached", [True, False])
def test_the_first_command_of_the_page_trains_with_and_without_cached_latents(
    small_sd: DemoFolder, tmp_path: Path, cached: bool
) -> None:
    runs = ModelRuns(small_sd, tmp_path)
    words = [word for word in replaced(commands()[0], tmp_path, small_sd) if cached or word != "--cache_latents"]
    words = words[words.index("train_db.py") + 1 :]
    trainer = SmallModelTrainer(runs.settings("run", f"--dataset_config={runs.dataset()}", *words))
    assert trainer.run() == 0
    assert (tmp_path / "out" / "my_model.safetensors").exists()
    assert trainer.data.latents_cached or not cached


def test_2x_is_trained_from_a_file_and_from_the_folder_that_came_of_it(small_sd: DemoFolder, tmp_path: Path) -> None:
    base, tokenizers = tmp_path / "two.safetensors", tmp_path / "tokenizers"
    save_safetensors(file_of_2x(), base)
    write_tokenizer(tokenizers / "stabilityai_stable-diffusion-2", demo_words())
    words = ("--v2", "--v_parameterization", "--tokenizer_cache_dir", str(tokenizers), "--max_train_steps=1")
    runs = ModelRuns(small_sd, tmp_path)
    first = ("--pretrained_model_name_or_path", str(base), "--save_model_as=diffusers_safetensors")
    runs.train("first", *words, *first)
    folder = tmp_path / "first" / "small"
    assert '"v_prediction"' in (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    second = runs.train("second", *words, "--pretrained_model_name_or_path", str(folder))
    written = tmp_path / "second" / "small.safetensors"
    assert load_file(written).keys() == {key for key in file_of_2x() if key != "model_ema.decay" and key != "betas"}
    for module, load in ((second.models.denoiser, load_unet), (second.models.text_encoders[0], load_text_encoder)):
        again = load(written, True, torch.float32, CPU).state_dict()
        assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["safetensors", "diffusers_safetensors"])
def test_a_run_that_is_killed_while_it_saves_leaves_whole_models_only(
    small_sd: DemoFolder, tmp_path: Path, kind: str
) -> None:
    base, new = small_sd.checkpoint, trained(small_sd.checkpoint, False)
    target, saves = path_of(tmp_path, "model", kind), writer(base, False, kind, tmp_path / "tokenizers")
    saves.write(target, new, {}, 0, 0)
    for attempt in range(5):
        child = os.fork()
        if child == 0:
            while True:
                saves.write(target, new, {}, 1, 1)
        time.sleep(0.01 + 0.03 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Between two renames a folder may be away for a moment; what is there is whole.
        if kind not in FOLDER_KINDS or target.exists():
            saves.check(target, new)
            assert torch.equal(
                load_unet(target, False, torch.float32, CPU).conv_in.weight, new["unet"]["conv_in.weight"]
            )
        visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
        assert set(visible) <= {target.name, "tokenizers"}


@pytest.mark.parametrize("name", ["__mp_main__", "train_db"])
def test_a_worker_process_may_run_the_script_without_starting_a_training(name: str) -> None:
    found = runpy.run_path(str(ROOT / "train_db.py"), run_name=name)
    trainer = found["StableDiffusionTrainer"]
    assert issubclass(trainer, DreamBoothTrainer) and trainer.architecture is StableDiffusion
    assert "settings" not in found
