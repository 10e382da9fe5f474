"""What do images and captions cost before and during training? Prints seconds and counts as JSON; see bench.py."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from library.data.cache_files import Recipe, image_state, latents_path, read_latents, write_latents
from library.data.caching import cache_latents
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.loader import BatchOrder, Loader
from library.data.pixels import make_picture, to_pixels
from library.files.formats import LatentFormat

SDXL = LatentFormat(channels=4, stride=8, suffix="_sdxl.npz")
LARGE = (1536, 1024)
"""Width and height of a photograph of 1.5 million pixels, which a bucket of the 1024 class shows."""
NUM_LARGE, NUM_SMALL = 32, 256
CPU = torch.device("cpu")


def main() -> int:
    """Measure everything on folders that are thrown away."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as root:
        small, large = Path(root) / "small", Path(root) / "large"
        found = scanning(Path(root), 2_000, "scan_2000") | scanning(Path(root), 20_000, "scan_20000")
        write_photographs(large, NUM_LARGE, LARGE)
        found |= decoding(large) | loading(large) | cache_files(large)
        write_photographs(small, NUM_SMALL, (64, 64))
        found |= caching(small) | epochs(small)
    print(json.dumps(found))
    return 0


def scanning(root: Path, count: int, name: str) -> dict[str, float]:
    """CPU seconds to find captioned images of 64 pixels, the best of five; the page cache is warm."""
    folder = root / name
    write_photographs(folder, count, (64, 64))

    def best(**changes: object) -> float:
        return min([cpu_seconds(lambda: training_set(folder, 64, **changes)) for _ in range(6)][1:])

    return {name: best(), f"{name}_cache_info": best(cache_info=True)}


def decoding(folder: Path) -> dict[str, float]:
    """CPU milliseconds from a photograph to the tensor of its bucket, and the part of it that is decoding."""
    items = training_set(folder, 1024).datasets[0].items

    def all_pictures() -> None:
        for item in items:
            to_pixels([make_picture(item.path, item.resized, item.bucket)])

    return {"decode_ms": 1000 * min(cpu_seconds(all_pictures) for _ in range(3)) / len(items)}


def loading(folder: Path) -> dict[str, float]:
    """Images per second of the second epoch, as the training step takes them, with no worker, one and two."""
    speeds = {}
    for workers in (0, 1, 2):
        data = training_set(folder, 1024, num_repeats=3)
        loader = Loader(BatchOrder(data, seed=1), workers, persistent=True)
        for epoch in (1, 2):
            started = time.perf_counter()
            count = sum(len(batch.to(CPU).captions) for batch in loader.epoch(epoch, 0))
        speeds[f"images_per_s_{workers}"] = count / (time.perf_counter() - started)
    return speeds


def cache_files(folder: Path) -> dict[str, float]:
    """CPU milliseconds to write and to read the latents of one SDXL picture."""
    item = training_set(folder, 1024).datasets[0].items[0]
    recipe, state = Recipe(item.bucket, item.resized, None, "vae"), image_state(item.path)
    latents, file = torch.randn(4, item.bucket[1] // 8, item.bucket[0] // 8), latents_path(item, SDXL)

    def write() -> None:
        for _ in range(20):
            write_latents(file, item, SDXL, recipe, state, latents)

    def read() -> None:
        for _ in range(20):
            read_latents(file, SDXL, item, flipped=False)

    return {
        "latent_write_ms": 1000 * min(cpu_seconds(write) for _ in range(5)) / 20,
        "latent_read_ms": 1000 * min(cpu_seconds(read) for _ in range(5)) / 20,
    }


def caching(folder: Path) -> dict[str, float]:
    """CPU milliseconds that filling the cache costs per image besides the VAE: 64 pixels, one image at a time."""
    data = training_set(folder, 64)
    in_memory = cpu_seconds(lambda: fill(data, to_disk=False))
    on_disk = cpu_seconds(lambda: fill(training_set(folder, 64), to_disk=True))
    again = cpu_seconds(lambda: fill(training_set(folder, 64), to_disk=True))
    times = {"caching_memory_ms": in_memory, "caching_disk_ms": on_disk, "caching_again_ms": again}
    return {name: 1000 * seconds / NUM_SMALL for name, seconds in times.items()}


def epochs(folder: Path) -> dict[str, float]:
    """What the change from one epoch to the next costs, and how memory grows over five epochs."""
    cached = training_set(folder, 64)
    fill(cached, to_disk=True)
    waits, growth = [], {}
    for name, data in (("cached", cached), ("pixels", training_set(folder, 64))):
        loader, sizes = Loader(BatchOrder(data, seed=1)), []
        for epoch in range(1, 7):
            started = time.perf_counter()
            batches = loader.epoch(epoch, 0)
            next(batches)
            if name == "cached":
                waits.append(time.perf_counter() - started)
            for _ in batches:
                pass
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
        growth[f"growth_{name}_mb"] = (sizes[-1] - sizes[0]) / 1e6
    return {"boundary_ms": 1000 * max(waits[1:])} | growth


def fill(data: TrainingSet, to_disk: bool) -> None:
    """Fill the cache with an encoder that costs nothing."""

    def encode(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return pixels[:, :1, ::8, ::8].expand(-1, 4, -1, -1)

    cache_latents(data, encode, SDXL, vae_id="vae", batch_size=1, to_disk=to_disk)


def training_set(folder: Path, side: int, **changes: object) -> TrainingSet:
    """The images of a folder in buckets of about `side` pixels, four in a batch."""
    subset = SubsetSettings(folder, extension_chosen=True, caption_extension=".txt", **changes)  # type: ignore[arg-type]
    settings = DatasetSettings(
        (side, side), (subset,), batch_size=4, enable_bucket=True, min_bucket_reso=side // 2, max_bucket_reso=2 * side
    )
    return load_training_set(DatasetConfig((settings,)))


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Captioned JPEGs of soft noise; of many the bytes repeat, which nobody who reads headers can see."""
    folder.mkdir()
    random = np.random.default_rng(0)
    contents = []
    for _ in range(min(count, 8)):
        noise = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        path = folder / "one.jpg"
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        contents.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(contents[number % len(contents)])
        (folder / f"{number:05}.txt").write_text(f"subject {number}, red, round, small", encoding="utf-8")


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads."""
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
