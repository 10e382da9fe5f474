"""Do the two FLUX scripts answer --help and mistakes at once, and name all mistakes?"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from library.models.flux.architecture import Flux
from library.train.network_trainer import NetworkTrainer
from tests.scripts.test_train_network_cli import HEAVY, modules

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("flux_train_network.py", "flux_minimal_inference.py")


def run(script: str, *words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, str(ROOT / script), *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_groups_and_imports_nothing_heavy(script: str) -> None:
    done = run(script, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert "--apply_t5_attn_mask" in done.stdout and "FLUX.1 and Chroma:" in done.stdout
    assert not modules(done) & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_missing_file_stands_in_one_message(script: str) -> None:
    done = run(script, "--model_typ=chromas", "--guidanc=x")
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert done.returncode == 2 and lines[0].startswith(script)
    assert any(line.startswith("--model_type: invalid choice: 'chromas'") for line in lines)
    assert any(line.startswith("--t5xxl is missing") for line in lines)
    assert any(line.startswith("--ae is missing") for line in lines)
    assert "Traceback" not in done.stderr


def test_a_worker_process_may_run_the_script_without_starting_a_training() -> None:
    found = runpy.run_path(str(ROOT / "flux_train_network.py"), run_name="__mp_main__")
    trainer = found["FluxNetworkTrainer"]
    assert issubclass(trainer, NetworkTrainer) and trainer.architecture is Flux
    assert "settings" not in found
