"""A run that is killed while it fills a cache leaves nothing that the next one trips over."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch

from library.data.items import BatchRequest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("slow_caching.py")
IMAGES, KILLS = 60, 10


@pytest.fixture(scope="module")
def slow_caching() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slow_caching", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that has read the folder and is about to fill the cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, encoding="utf-8", env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def whole_arrays(folder: Path) -> int:
    """The number of latents on disk; every file under a final name must be whole."""
    count = 0
    for file in folder.glob("*_slow.npz"):
        if file.name.startswith("."):
            continue
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, file
        with np.load(file) as arrays:
            sizes = [name for name in arrays.files if name.startswith("latents")]
            assert sizes and all(np.isfinite(arrays[name]).all() for name in sizes), file
            assert all(name.replace("latents", "fingerprint") in arrays.files for name in sizes), file
            count += len(sizes)
    return count


@pytest.mark.slow
def test_ten_kills_at_any_moment_cost_only_what_was_not_written_yet(
    tmp_path: Path, image: Callable[..., Path], slow_caching: ModuleType
) -> None:
    for number in range(IMAGES):
        image(tmp_path / f"{number:02}.png", (64, 64), number)
    random, killed, before = Random(5), 0, 0
    for _ in range(KILLS):
        process = start(tmp_path)
        time.sleep(random.uniform(0.0, 0.25))
        process.kill()
        killed += process.wait() != 0
        written = whole_arrays(tmp_path)
        assert written >= before  # nothing that was there is lost
        before = written
    assert killed == KILLS and 0 < before < 2 * IMAGES
    output, _ = start(tmp_path).communicate(timeout=60)
    assert int(output) == 2 * IMAGES - before
    assert whole_arrays(tmp_path) == 2 * IMAGES
    check_values(tmp_path, slow_caching)
    output, _ = start(tmp_path).communicate(timeout=60)
    assert int(output) == 0


def check_values(folder: Path, slow_caching: ModuleType) -> None:
    """What is read from disk is what the encoder makes of every image."""
    fresh, cached = slow_caching.data_of(folder), slow_caching.data_of(folder)

    def fail(pixels: torch.Tensor, seeds: object) -> torch.Tensor:
        raise AssertionError("everything was on disk")

    slow_caching.cache_latents(cached, fail, slow_caching.FORMAT, vae_id="slow", batch_size=1, to_disk=True)
    for dataset in (0, 1):
        for index in range(IMAGES):
            request = BatchRequest(dataset, (index,), (1,), 1, 0, 1)
            pixels, latents = fresh[request].to(torch.device("cpu")).pixels, cached[request].latents
            assert pixels is not None and latents is not None
            assert torch.equal(latents, slow_caching.encode(pixels, [0]))
