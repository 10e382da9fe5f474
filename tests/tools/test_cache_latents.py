"""The tools that fill caches, as they are started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from demo_folder import DemoFolder

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
    *("--main_process_port", "0"),
)


def launch(script: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(ROOT / "tools" / script), *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def on_pictures(demo: DemoFolder, folder: Path) -> list[str]:
    """Flags for a copy of the demo's pictures in `folder`."""
    shutil.copytree(demo.pictures, folder / "1_things")
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--train_data_dir", str(folder), "--caption_extension", ".txt", "--resolution", "64"),
    ]


def test_two_processes_share_the_images_and_leave_whole_files(small_sd: DemoFolder, tmp_path: Path) -> None:
    words = on_pictures(small_sd, tmp_path)
    result = launch("cache_latents.py", *words, "--flip_aug", "--learning_rate", "1e-3", launcher=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "--tokenizer_cache_dir, --learning_rate have no effect: cached latents do not" in result.stderr
    pictures = [path for path in (tmp_path / "1_things").iterdir() if path.suffix == ".png"]
    files = list((tmp_path / "1_things").glob("*_sd.npz"))
    assert len(files) == len(pictures) > 4
    for file in files:
        with np.load(file) as arrays:
            assert arrays["latents"].shape == arrays["latents_flipped"].shape == (4, 8, 8)


def test_text_of_stable_diffusion_is_refused_in_one_line(small_sd: DemoFolder, tmp_path: Path) -> None:
    result = launch("cache_text_encoder_outputs.py", *on_pictures(small_sd, tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "sd models have no cache of text: their encoder is small and runs at every step" in result.stderr


def test_help_costs_no_import_of_torch() -> None:
    for script in ("cache_latents.py", "cache_text_encoder_outputs.py"):
        result = launch(script, "--help", launcher=("-X", "importtime"))
        assert result.returncode == 0 and "--skip_cache_check" in result.stdout
        assert not any(line.endswith(("| torch", "| numpy")) for line in result.stderr.splitlines())
