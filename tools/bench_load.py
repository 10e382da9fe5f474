"""What does loading a full-size SD 1.5 checkpoint cost? Prints seconds and gigabytes as JSON; see bench.py."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from demo_pictures import words
from demo_tokenizer import FOLDER, write_tokenizer
from header_only import header
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


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def write_random_checkpoint(path: Path, dtype: str) -> None:
    """Every tensor of the published file under its name."""
    write_random_bytes(path, *header("sd15", dtype))


def write_random_bytes(path: Path, start: bytes, size: int) -> None:
    """`start` and `size` bytes more, the same random ones again and again."""
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        file.write(start)
        for done in range(0, size, len(block)):
            file.write(block[: size - done])
        file.flush()
        os.fsync(file.fileno())  # so that writing back does not run beside the measurement


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
