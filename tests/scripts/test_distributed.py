"""Several processes train as one with a larger batch; the commands of docs/distributed.md work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo_flux_folder import FluxDemo
from demo_flux_weights import FluxSizes, small_transformer
from demo_folder import DemoFolder
from library.files.weights import open_weights, save_safetensors
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK
from tests.clients.fixed_draws import FixedDraws
from tests.clients.flux_training import flux_words
from tests.clients.launcher import TWO_PROCESSES, said_by

ROOT = Path(__file__).resolve().parents[2]


def words(demo: DemoFolder, folder: Path, batch_size: int) -> list[str]:
    """Twelve images of one size, two to a step, trained by plain gradient descent."""
    config = folder / f"batch{batch_size}.toml"
    text = f"[[datasets]]\nresolution = 64\nbatch_size = {batch_size}\ncaption_extension = '.txt'\n"
    config.write_text(f'{text}[[datasets.subsets]]\nimage_dir = "{demo.pictures.as_posix()}"\n', encoding="utf-8")
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--dataset_config", str(config), "--output_dir", str(folder / f"out{batch_size}"), "--output_name", "small"),
        *("--network_module", "networks.lora", "--network_dim", "4", "--seed", "3", "--max_train_steps", "4"),
        *("--optimizer_type", "torch.optim.SGD", "--learning_rate", "0.5", "--cache_latents"),
    ]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        return {key: file.read(key) for key in file.keys()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())


def test_two_processes_train_as_one_with_twice_the_batch(small_sd: DemoFolder, tmp_path: Path) -> None:
    said = said_by(*TWO_PROCESSES, "tests/scripts/fixed_draws.py", *words(small_sd, tmp_path, 1))
    assert re.search(r"number of processes +2", said)
    assert FixedDraws(read_settings(TRAIN_NETWORK, "test", argv=words(small_sd, tmp_path, 2))).run() == 0

    first, second = tensors(tmp_path / "out1/rank0.safetensors"), tensors(tmp_path / "out1/rank1.safetensors")
    alone = tensors(tmp_path / "out2/rank0.safetensors")
    assert first.keys() == alone.keys() and all(torch.equal(first[key], second[key]) for key in first)
    ups = {key: value for key, value in alone.items() if "lora_up" in key}  # they start at zero
    assert norm(ups) > 1e-3
    assert norm({key: first[key] - ups[key] for key in ups}) < 1e-4 * norm(ups)


def test_the_commands_of_the_page_name_flags_that_accelerate_has() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    used = set(re.findall(r"accelerate launch ((?:[^\n\\]|\\\n)*?)train_network\.py", page))
    assert len(used) >= 2
    known = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--help"],
        capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"},
    ).stdout  # fmt: skip
    for command in used:
        for flag in re.findall(r"--\w+", command):
            assert flag in known, flag


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_with_swapped_blocks_end_with_the_weights_of_two_without(
    small_flux: FluxDemo, tmp_path: Path
) -> None:
    model, pictures = tmp_path / "deep.safetensors", tmp_path / "pictures"
    save_safetensors(small_transformer(FluxSizes(double_blocks=3, single_blocks=4), "dev"), model)
    pictures.mkdir()
    for name in ("01_orange_circle", "06_red_star"):  # one for each process
        for suffix in (".png", ".txt"):
            shutil.copy(small_flux.pictures / f"{name}{suffix}", pictures)
    dataset = tmp_path / "two.toml"
    text = f'image_dir = "{pictures.as_posix()}"\ncaption_extension = ".txt"\n'
    dataset.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{text}", encoding="utf-8")
    words = ["--pretrained_model_name_or_path", str(model), "--dataset_config", str(dataset)]
    words += ["--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs"]
    swapped = ["--blocks_to_swap=2", "--cpu_modulation", "--gradient_checkpointing"]
    runs = [flux_words(small_flux, tmp_path / name, *words, *more) for name, more in (("plain", []), ("away", swapped))]
    said = said_by("tests/scripts/two_swapped_ranks.py", given=json.dumps(runs))
    assert len(re.findall(r"number of processes +2", said)) == 2
    assert "3 of 7 blocks lie in main memory" in said
    plain, *others = (tensors(tmp_path / run / f"rank{rank}.safetensors") for run in ("plain", "away") for rank in "01")
    assert norm({key: value for key, value in plain.items() if "lora_up" in key}) > 0
    assert all(torch.equal(other[key], plain[key]) for other in others for key in plain)
