"""Weights that a launcher with FSDP divides: two ranks end with the weights, losses and pictures of whole ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo_flux_folder import FluxDemo
from demo_folder import DemoFolder
from library.train.log_file import read_log
from tests.clients.continuing import tensors
from tests.clients.flux_training import flux_words
from tests.clients.launcher import handed_on, said_by

LAUNCHER = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: false
"""
DATASET = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64
batch_size = 1

  [[datasets.subsets]]
  image_dir = "{root}/some"

  [[datasets.subsets]]
  image_dir = "{root}/prior"
  custom_attributes.diff_output_preservation = true
"""


def command_line(demo: DemoFolder, root: Path) -> list[str]:
    """Images of which some keep the prior, one for validation, and one picture; both are made in steps 2 and 4."""
    for number, picture in enumerate(sorted(demo.pictures.glob("*.png"))[:6]):
        folder = root / ("some" if number < 4 else "prior")
        folder.mkdir(exist_ok=True)
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    (root / "dataset.toml").write_text(DATASET.format(root=root.as_posix()), encoding="utf-8")
    (root / "prompts.txt").write_text("a red star --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--dataset_config", str(root / "dataset.toml"), "--output_name", "small", "--cache_latents"),
        *("--network_module", "networks.lora", "--network_dim", "4", "--network_dropout", "0.1", "--seed", "3"),
        *("--max_train_steps", "4", "--optimizer_type", "torch.optim.SGD", "--learning_rate", "2", "--save_state"),
        *("--sample_prompts", str(root / "prompts.txt"), "--sample_every_n_steps", "2"),
        *("--validation_split", "0.3", "--validate_every_n_steps", "2", "--validate_every_n_epochs", "9"),
        *("--network_train_unet_only", "--max_data_loader_n_workers", "0"),
    ]


def flux_command_line(demo: FluxDemo, root: Path) -> list[str]:
    """Two steps on the pictures of the other runs."""
    words = ("--dataset_config", str(root / "dataset.toml"), "--optimizer_type", "torch.optim.SGD", "--seed", "3")
    cached = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
    return flux_words(demo, root, *words, *cached, "--learning_rate", "0.5")


def launch(demo: DemoFolder, flux: FluxDemo, root: Path) -> None:
    lines = [command_line(demo, root), flux_command_line(flux, root)]
    (root / "words.json").write_text(json.dumps(lines), encoding="utf-8")
    (root / "launcher.yaml").write_text(LAUNCHER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    answers = handed_on("--config_file", str(root / "launcher.yaml"))
    assert answers["ACCELERATE_USE_FSDP"] == "true"
    ours = {name: value for name, value in answers.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    said = said_by("tests/scripts/two_ranks_fsdp.py", str(root), environment=os.environ | ours | meeting)
    assert "FSDP: of 0.01 GB of frozen weights of the denoiser this process keeps" in said


def held(folder: Path, rank: int) -> dict[str, int]:
    """Bytes of the denoiser that a rank held, and of all of it."""
    sizes: dict[str, int] = json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8"))
    return sizes


def validations(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Step -> image -> its losses."""
    tables = [row for row in read_log(folder / "small.log.jsonl", before=10**9) if row.get("table") == "validation"]
    return {row["step"]: {line["image"]: line for line in row["rows"]} for row in tables}


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Step and number of the prompt -> the picture."""
    return {path.name[:15]: np.asarray(Image.open(path), dtype=int) for path in (folder / "sample").iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_two_ranks_with_divided_weights_end_like_two_with_whole_ones(
    small_sd: DemoFolder, small_flux: FluxDemo, tmp_path: Path
) -> None:
    launch(small_sd, small_flux, tmp_path)
    whole, stopped, continued = (tmp_path / name for name in ("whole", "stopped", "continued"))

    for first, second, moved in ((whole, continued, 1e-2), (tmp_path / "flux_whole", tmp_path / "flux", 1e-4)):
        expected, found = tensors(first / "small.safetensors"), tensors(second / "small.safetensors")
        assert expected.keys() == found.keys()
        assert max(float(value.abs().max()) for key, value in expected.items() if "lora_up" in key) > moved  # from 0
        assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-4 * moved
    ranks = [tensors(continued / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert all(bool((ranks[0][key] == ranks[1][key]).all()) for key in ranks[0])
    assert not (stopped / "small.safetensors").exists()

    in_whole = held(whole, 0)
    assert in_whole["held"] == in_whole["whole"] == held(continued, 0)["whole"]
    for size in (held(folder, rank) for folder in (continued, tmp_path / "flux") for rank in (0, 1)):
        assert 0.5 <= size["held"] / size["whole"] < 0.52, size

    judged = validations(stopped) | validations(continued)
    assert judged.keys() == validations(whole).keys() and len(judged) == 2
    for step, images in validations(whole).items():
        assert judged[step].keys() == images.keys() and len(images) == 1  # fewer than ranks
        for image, line in images.items():
            losses = {name: value for name, value in line.items() if name != "image"}
            assert {name: judged[step][image][name] for name in losses} == pytest.approx(losses, rel=1e-5)

    drawn = pictures(stopped) | pictures(continued)
    assert drawn.keys() == pictures(whole).keys() and len(drawn) == 2
    for name, picture in pictures(whole).items():
        assert np.abs(drawn[name] - picture).max() <= 1, name
