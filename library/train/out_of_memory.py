"""What to change when memory has run out."""

from __future__ import annotations

import torch

from library.flags.dataset import CacheFlags, DatasetFlags
from library.flags.run import LargeModelFlags
from library.flags.settings import Settings
from library.train.memory_estimate import cures

GIGABYTE = 1e9


def advice(settings: Settings, error: BaseException) -> str:
    """What ran out and what would help, what costs least first; the last line is what to try first."""
    on_device = is_of_device(error)
    ways = cures(settings) if on_device else main_memory_cures(settings)
    reason = str(error).split("\n")[0] or type(error).__name__
    where = "the device" if on_device else "the machine"
    head = f"{reason}\nthe memory of {where} has run out{_in_use() if on_device else ''}. What to change, what costs"
    lines = "\n".join(f"  {way}" for way in ways)
    return f"{head} least first:\n{lines}\nout of memory; try this first: {ways[0]}"


def is_of_device(error: BaseException) -> bool:
    """Whether it was the memory of a GPU; torch names the CPU's allocator."""
    text = str(error)
    return not isinstance(error, MemoryError) and "CPU" not in text and "not enough memory" not in text


def main_memory_cures(settings: Settings) -> list[str]:
    """What to change so that less main memory is needed; without what is done already."""
    cache, dataset, large = settings[CacheFlags], settings[DatasetFlags], settings.get(LargeModelFlags)
    options = [
        (
            cache.cache_latents and not cache.cache_latents_to_disk,
            "--cache_latents_to_disk: encoded images lie on the disk and not in memory",
        ),
        (
            not cache.cache_latents and dataset.max_data_loader_n_workers > 1,
            "--max_data_loader_n_workers=1: each process that reads images holds some of them",
        ),
        (dataset.persistent_data_loader_workers, "without --persistent_data_loader_workers"),
        (cache.cache_dtype is None and cache.cache_latents, "--cache_dtype=bfloat16: half the memory for the caches"),
        (large.cpu_modulation, "without --cpu_modulation: it keeps weights in main memory"),
        (
            bool(large.blocks_to_swap),
            "a smaller --blocks_to_swap: the weights of swapped blocks lie in main memory",
        ),
        (True, "other programs: close what holds much memory, or add swap space"),
    ]
    return [text for applies, text in options if applies]


def _in_use() -> str:
    """How much of the GPU is taken, and how much of that by this process."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    return (
        f" ({(total - free) / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB are in use, {ours / GIGABYTE:.1f} GB of them "
        f"by this process, {torch.cuda.max_memory_allocated() / GIGABYTE:.1f} GB at most)"
    )
