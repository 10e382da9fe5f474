"""sdxl_train_network.py on the small model: the published command, what it leaves, and what it learns."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor

from demo_sdxl_folder import SdxlDemo
from library.files.weights import open_weights
from tests.clients.continuing import equal, tensors
from tests.clients.sdxl_training import sdxl_settings, train_sdxl
from tests.scripts.test_train_network import launch

# As published; the paths are those of this place, and what the caches need is said by the page's own note on them.
COMMAND = """
  --pretrained_model_name_or_path="{model}" --dataset_config="{dataset}" --output_dir="{output}"
  --output_name="my_sdxl_lora" --save_model_as=safetensors --network_module=networks.lora --network_dim=32
  --network_alpha=16 --learning_rate=1e-4 --unet_lr=1e-4 --text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5
  --optimizer_type="AdamW8bit" --lr_scheduler="constant" --max_train_epochs=10 --save_every_n_epochs=1
  --mixed_precision="bf16" --gradient_checkpointing --cache_text_encoder_outputs --cache_latents
"""
CACHED = ("--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs")
FEW = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64
batch_size = {number}

  [[datasets.subsets]]
  image_dir = "{folder}"
"""


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """accelerate keeps the precision of the first run of a process; here each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def few_pictures(demo: SdxlDemo, folder: Path, number: int = 2) -> Path:
    """A dataset of so many pictures in one batch, for runs that cost little."""
    folder.mkdir()
    for picture in sorted(demo.pictures.glob("*.png"))[:number]:
        for file in (picture, picture.with_suffix(".txt")):
            (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "few.toml"
    config.write_text(FEW.format(folder=folder.as_posix(), number=number), encoding="utf-8")
    return config


def rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def published(demo: SdxlDemo, folder: Path, *more: str, without: tuple[str, ...] = ()) -> list[str]:
    dataset = few_pictures(demo, folder / "few")
    words = shlex.split(COMMAND.format(model=demo.checkpoint, dataset=dataset, output=folder / "out"))
    kept = [word for word in words if word not in without]
    return [*kept, "--tokenizer_cache_dir", str(demo.tokenizers), "--max_data_loader_n_workers", "0", *more]


def test_the_published_command_runs_with_all_three_parts_trained(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process", "1")
    words = published(small_sdxl, tmp_path, without=("--cache_text_encoder_outputs",))
    result = launch(*words, "--max_train_epochs=3", script="sdxl_train_network.py", launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [*(f"my_sdxl_lora-{epoch:06d}.safetensors" for epoch in range(1, 3)), "my_sdxl_lora.safetensors"]
    with open_weights(tmp_path / "out" / "my_sdxl_lora.safetensors") as file:
        assert {key.split("_")[1] for key in file.keys()} == {"unet", "te1", "te2"}
        assert file.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
        assert file.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_the_published_command_as_it_stands_is_refused_with_what_its_page_demands(
    small_sdxl: SdxlDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = published(small_sdxl, tmp_path)
    with pytest.raises(SystemExit):
        sdxl_settings(words)
    assert "--cache_text_encoder_outputs needs --network_train_unet_only" in capsys.readouterr().err
    sdxl_settings([*words, "--network_train_unet_only"])


def test_cached_text_trains_as_text_encoded_at_every_step(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    def trained(name: str, *words: str) -> dict[str, Tensor]:
        train_sdxl(small_sdxl, tmp_path / name, "--network_train_unet_only", "--max_token_length", "225", *words)
        return tensors(tmp_path / name / "small.safetensors")

    trained("start")  # what is drawn first would be another random number without the text encoders
    start = ("--network_weights", str(tmp_path / "start" / "small.safetensors"))
    live, cached = trained("live", "--cache_latents", *start), trained("cached", *CACHED, *start)
    assert live.keys() == cached.keys()
    for key, value in live.items():
        torch.testing.assert_close(value, cached[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        (*CACHED, "--network_dropout", "0.2", "--min_snr_gamma", "5", "--noise_offset", "0.0357"),
        ("--no_half_vae", "--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing"),
    ],
    ids=["cached", "everything trained in bf16, nothing cached"],
)
def test_a_run_continues_with_equal_bits(small_sdxl: SdxlDemo, tmp_path: Path, words: tuple[str, ...]) -> None:
    words = (*words, "--max_train_steps", "4")
    train_sdxl(small_sdxl, tmp_path / "whole", *words, "--save_every_n_steps", "2", "--save_state")
    state = tmp_path / "whole" / "small-step00000002-state"
    train_sdxl(small_sdxl, tmp_path / "resumed", *words, "--resume", str(state))
    assert equal(tensors(tmp_path / "whole" / "small.safetensors"), tensors(tmp_path / "resumed" / "small.safetensors"))


def test_training_lowers_the_loss_of_pictures_that_are_held_out_and_draws_them(
    small_sdxl: SdxlDemo, tmp_path: Path
) -> None:
    words = ["--max_train_steps", "60", "--learning_rate", "5e-3", "--network_alpha", "4", "--network_dim", "8"]
    words += ["--validation_split", "0.35", "--validate_every_n_steps", "20", "--sample_prompts"]
    words += [str(small_sdxl.prompts), "--sample_at_first", "--sample_every_n_steps", "60"]
    train_sdxl(small_sdxl, tmp_path, *CACHED, *words)
    found = [row for row in rows(tmp_path / "small.log.jsonl") if "loss/validation/step_average" in row]
    losses = [row["loss/validation/step_average"] for row in found]
    assert len(losses) == 3 and losses[-1] < losses[0], losses
    pictures = sorted((tmp_path / "sample").glob("*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(64, 64), (96, 64)] * 2
    assert pictures[0].read_bytes() != pictures[2].read_bytes()


def test_the_loss_of_one_picture_falls(small_sdxl: SdxlDemo, tmp_path: Path) -> None:
    dataset = few_pictures(small_sdxl, tmp_path / "one", 1)
    words = ["--dataset_config", str(dataset), "--max_train_steps", "80", "--learning_rate", "1e-2"]
    train_sdxl(small_sdxl, tmp_path / "out", *CACHED, *words, "--network_alpha", "4")
    losses = [row["loss/current"] for row in rows(tmp_path / "out" / "small.log.jsonl") if "loss/current" in row]
    first, last = losses[:30], losses[-30:]
    assert sum(last) < 0.8 * sum(first), (sum(first), sum(last))
