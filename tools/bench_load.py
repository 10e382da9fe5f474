"""What does loading a full-size SD 1.5 checkpoint cost? Prints seconds and gigabytes as JSON; see bench.py."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from bench_memory import peak_memory
from demo_pictures import words
from demo_tokenizer import FOLDER, write_tokenizer
from header_only import header, write_random_bytes
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.sd.architecture import StableDiffusion


def main(dtype: str) -> int:
    """Write the file, load its three models once, print what that took."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "sd15.safetensors"
        write_random_checkpoint(checkpoint, dtype)
        write_tokenizer(Path(folder) / FOLDER, words())
        print(json.dumps(measure(checkpoint, getattr(torch, dtype))))
    return 0


def measure(checkpoint: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and the growth of the process's largest memory, imports left out."""
    flags = ModelFlags(pretrained_model_name_or_path=str(checkpoint), tokenizer_cache_dir=str(checkpoint.parent))
    arch = StableDiffusion(Settings.of(flags))
    cpu = torch.device("cpu")
    before, started, cpu_started = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    models = [arch.load_denoiser(dtype, cpu), *arch.load_text_encoders(dtype, cpu), arch.load_vae(dtype, cpu)]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert len(models) == 3
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gigabytes": checkpoint.stat().st_size / 1e9,
        "peak_gigabytes": (peak_memory() - before) / 1e9,
    }


def write_random_checkpoint(path: Path, dtype: str) -> None:
    """Every tensor of the published file under its name."""
    write_random_bytes(path, *header("sd15", dtype))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
