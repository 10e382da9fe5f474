"""A run that is killed while it fills a cache leaves nothing that the next one trips over."""

from __future__ import annotations

import os
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from library.data.items import BatchRequest
from tests.clients.fork_server import ForkServer
from tests.library.data import slow_caching

IMAGES, KILLS = 60, 10


def start(server: ForkServer, folder: Path) -> int:
    """A process that has read the folder and is about to fill the cache."""
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    process = server.start("tests.library.data.slow_caching:fill", str(folder), str(said))
    while not said.exists():
        time.sleep(0.01)
    return process


def finished(server: ForkServer, folder: Path) -> int:
    """How many images a process encodes that nobody kills."""
    assert server.wait(start(server, folder)) == 0
    return int((folder / "said.txt").read_text(encoding="utf-8"))


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
    tmp_path: Path, image: Callable[..., Path], fork_server: ForkServer
) -> None:
    for number in range(IMAGES):
        image(tmp_path / f"{number:02}.png", (64, 64), number)
    random, before = Random(5), 0
    for number in range(KILLS):
        process = start(fork_server, tmp_path)
        while number == 0 and not any(tmp_path.glob("*_slow.npz")):
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.25))
        os.kill(process, signal.SIGKILL)
        assert fork_server.wait(process) == -signal.SIGKILL
        written = whole_arrays(tmp_path)
        assert written >= before  # nothing that was there is lost
        before = written
    assert 0 < before < 2 * IMAGES
    assert finished(fork_server, tmp_path) == 2 * IMAGES - before
    assert whole_arrays(tmp_path) == 2 * IMAGES
    check_values(tmp_path)
    assert finished(fork_server, tmp_path) == 0


def check_values(folder: Path) -> None:
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
