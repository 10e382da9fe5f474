"""What does loading a checkpoint of full size cost? Prints seconds and gigabytes as JSON; see bench.py."""

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
from demo_sdxl_folder import write_clip_tokenizers
from header_only import header, write_random_bytes
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.models.sd.architecture import StableDiffusion
from library.models.sdxl.architecture import Sdxl

FAMILIES: dict[str, type[Architecture]] = {"sd15": StableDiffusion, "sdxl_base": Sdxl}
"""Name of a published file -> what reads it."""


def main(facts: str, dtype: str) -> int:
    """Write a file like the published one called `facts`, load all its models once, print what that took."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{facts}.safetensors"
        write_random_bytes(checkpoint, *header(facts, dtype))
        write_clip_tokenizers(Path(folder), words())
        print(json.dumps(measure(FAMILIES[facts], checkpoint, getattr(torch, dtype))))
    return 0


def measure(family: type[Architecture], checkpoint: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and the growth of the process's largest memory, imports left out."""
    flags = ModelFlags(pretrained_model_name_or_path=str(checkpoint), tokenizer_cache_dir=str(checkpoint.parent))
    arch = family(Settings.of(flags))
    cpu = torch.device("cpu")
    before, started, cpu_started = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    models = [arch.load_denoiser(dtype, cpu), *arch.load_text_encoders(dtype, cpu), arch.load_vae(dtype, cpu)]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert all(isinstance(model, torch.nn.Module) for model in models)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gigabytes": checkpoint.stat().st_size / 1e9,
        "peak_gigabytes": (peak_memory() - before) / 1e9,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
