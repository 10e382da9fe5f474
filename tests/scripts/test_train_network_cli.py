from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import toml

from library.models.sd.architecture import StableDiffusion
from library.train.network_trainer import NetworkTrainer

SCRIPT = Path(__file__).resolve().parents[2] / "train_network.py"
HEAVY = {"torch", "numpy", "transformers", "diffusers", "accelerate", "safetensors", "PIL", "cv2", "pydantic"}


def run(*words: str, python: tuple[str, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *python, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment,
        timeout=300,
    )


def modules(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level names of what was imported, from the report of `-X importtime`."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_lists_the_groups_and_imports_nothing_heavy() -> None:
    done = run("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert "--network_module" in done.stdout and "Learning rate schedule:" in done.stdout
    assert not modules(done) & HEAVY


def test_a_mistake_in_the_settings_imports_nothing_heavy() -> None:
    done = run("--netwrk_dim=4", python=("-X", "importtime"))
    assert done.returncode == 2
    assert not modules(done) & HEAVY


def test_every_mistake_stands_in_one_message(tmp_path: Path) -> None:
    done = run("--netwrk_dim=4", "--deepspeed", "--seed=one", f"--output_dir={tmp_path}")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert lines[0] == "train_network.py: 6 mistakes in the settings:"
    assert "  --netwrk_dim is not a flag of this script; did you mean --network_dim?" in lines
    assert "  --deepspeed needs the package deepspeed: pip install deepspeed" in lines
    assert "  --seed: invalid int value: 'one'" in lines
    assert len(lines) == 7


def test_a_mistake_in_the_config_file_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[a]\nlearning_rat = 1e-4\n", encoding="utf-8")
    done = run("--config_file=run", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "  run.toml: learning_rat is not a flag of this script; did you mean learning_rate?" in done.stderr.splitlines()
    )


def test_output_config_writes_a_file_once(tmp_path: Path) -> None:
    words = ["--seed=3", "--network_args", "conv_dim=4", "--output_config", "--config_file=run"]
    first, second = run(*words, cwd=tmp_path), run(*words, cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 1)
    assert toml.loads((tmp_path / "run.toml").read_text(encoding="utf-8")) == {
        "seed": 3,
        "network_args": ["conv_dim=4"],
    }
    assert "run.toml exists and is not overwritten" in second.stderr


@pytest.mark.parametrize("name", ["__mp_main__", "train_network"])
def test_a_worker_process_may_run_the_script_without_starting_a_training(name: str) -> None:
    found = runpy.run_path(str(SCRIPT), run_name=name)
    trainer = found["StableDiffusionNetworkTrainer"]
    assert issubclass(trainer, NetworkTrainer) and trainer.architecture is StableDiffusion
    assert "settings" not in found
