"""How fast and how large is it? `python tools/bench.py [startup] [load] [step] ...`: a table.

Without a name it measures all that needs no GPU; `--help` has the names. Run it with the Python of `.venv`. Times are
those of this machine; counts are the same on every one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_rows import ROOT, Row, Table, command_of, outcome, rows_of_script, run_script


@dataclass(frozen=True)
class Choice:
    """What the command line says about models at full size."""

    family: str | None
    size: str
    device: str
    steps: int | None
    limit: float
    """Seconds that one row may take."""
    found: Mapping[str, str]
    """Measure -> value of the rows that need not be measured again."""

    def words(self, what: str, steps: int) -> tuple[str, ...]:
        """The arguments of `bench_gpu.py`."""
        if self.family is None:
            raise SystemExit(f"{what} needs --family {{{','.join(FAMILIES)}}}")
        words = {"family": self.family, "size": self.size, "device": self.device, "steps": str(self.steps or steps)}
        return (what, *(word for name, value in words.items() for word in (f"--{name}", value)))


def main() -> int:
    """Measure what was asked for and print it as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"any of: {', '.join(BENCHES)}; all but the last two if none is named")
    parser.add_argument("--family", choices=FAMILIES, help="for counts, gpu, endurance: a published model at full size")
    parser.add_argument(
        "--output", type=Path, help="also write each row to this file; gpu and endurance leave out those that it has"
    )
    parser.add_argument("--size", choices=("full", "small"), default="full", help="for gpu, endurance (default: full)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for gpu, endurance (default: cuda)")
    parser.add_argument("--steps", type=int, help="of each row of gpu (default: 10) and endurance (default: 500)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a row of gpu, endurance (default: 600)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.what) - BENCHES.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(BENCHES)}")
    try:
        table = Table(f"commit {commit()}, {machine()}", arguments.output, sys.stdout)
    except ValueError as error:
        parser.error(f"--output: {error}")
    given = {name: getattr(arguments, name) for name in ("family", "size", "device", "steps", "limit")}
    choice = Choice(**given, found=table.found)
    for name in arguments.what or (name for name in BENCHES if name not in ON_GPU):
        for row in BENCHES[name](choice):
            table.add(row)
    return 0


def startup(_: Choice) -> list[Row]:
    """What `train_network.py --help` costs: the best of five."""
    runs = [run_measured([sys.executable, "train_network.py", "--help"]) for _ in range(5)]
    wall, megabytes = min(run[0] for run in runs), min(run[1] for run in runs)
    name = "`train_network.py --help`"
    return [Row(f"{name}, s", f"{wall:.2f}", "0.5"), Row(f"{name}, MB", f"{megabytes:.0f}", "60")]


def load(_: Choice) -> list[Row]:
    """Checkpoints of full size of random numbers, all models of them."""
    rows = []
    for facts, title, dtype in LOADED:
        found = json_of_script("bench_load.py", facts, dtype)
        name = f"load {title}, {dtype}, {found['gigabytes']:.2f} GB"
        rows.append(Row(f"{name}, s per GB", f"{found['seconds'] / found['gigabytes']:.2f}", "3"))
        rows.append(Row(f"{name}, CPU s per GB", f"{found['cpu_seconds'] / found['gigabytes']:.2f}"))
        rows.append(Row(f"{name}, peak memory / file", f"{found['peak_gigabytes'] / found['gigabytes']:.3f}", "1.1"))
    return rows


LOADED = (("sd15", "SD 1.5", "float16"), ("sd15", "SD 1.5", "float32"), ("sdxl_base", "SDXL", "float16"))
"""Published files that are read, what they are called here, and their numbers."""


def order(_: Choice) -> list[Row]:
    """A training and a picture of FLUX.1 with parts of a tenth of their size: what main memory holds at once."""
    with tempfile.TemporaryDirectory() as folder:
        found = json_of_script("bench_order.py", folder)
        peaks = {
            name: run_measured([sys.executable, *words], log=subprocess.DEVNULL)[1] / 1000
            for name, words in found["commands"].items()
        }
    limit = f"{peaks['nothing'] + max(found['transformer'], found['t5xxl']) + ROOM_OF_A_STEP:.2f}"
    parts = f"FLUX.1, transformer {found['transformer']:.2f} GB, T5 {found['t5xxl']:.2f} GB"
    return [
        Row(f"{parts}, nothing of them loaded (`--dry_run`), peak memory, GB", f"{peaks['nothing']:.2f}"),
        Row(f"{parts}, training with cached text, peak memory, GB", f"{peaks['cached']:.2f}", limit),
        Row(f"{parts}, one picture, peak memory, GB", f"{peaks['picture']:.2f}", limit),
        Row(f"{parts}, training without caches, peak memory, GB", f"{peaks['uncached']:.2f}"),
    ]


ROOM_OF_A_STEP = 0.3
"""Gigabytes for what a step calculates with, and for what the allocator does not give back."""


def merge(_: Choice) -> list[Row]:
    """A LoRA of rank 16 merged into a few FLUX.1 blocks of full size, bf16 to bf16."""
    found = json_of_script("bench_merge.py")
    name = f"merge into {found['gigabytes']:.2f} GB of FLUX.1"
    return [
        Row(f"{name}, CPU s per GB", f"{found['cpu_seconds'] / found['gigabytes']:.2f}"),
        Row(f"{name}, peak memory, GB", f"{found['peak_gigabytes']:.2f}"),
        Row(f"{name}, peak memory / file", f"{found['peak_gigabytes'] / found['gigabytes']:.2f}"),
        Row(
            f"{name}, peak memory / largest weight", f"{found['peak_gigabytes'] / found['largest_gigabytes']:.1f}", "6"
        ),
    ]


def step(_: Choice) -> list[Row]:
    """Training steps of the small model on one thread."""
    found = json_of_script("bench_step.py")
    name = f"step, {found['layers']:.0f} LoRA layers, one thread"
    return [
        Row(f"{name}, CPU ms, median", f"{found['median_ms']:.1f}", "75"),
        Row(f"{name}, CPU ms, best", f"{found['best_ms']:.1f}"),
        Row("step, everything around forward, backward and optimizer, CPU ms", f"{found['around_ms']:.2f}", "3"),
    ]


def counts(choice: Choice) -> Iterable[Row]:
    """What a step makes the machine do: of the small model, or of one at full size beside the figures of sd-scripts."""
    if choice.family is not None:
        return rows_of_script("bench_full.py", choice.family)
    found = json_of_script("bench_counts.py")
    targets = {"scalar_reads": "0"}
    return [
        Row(f"step, {name.replace('_', ' ')}", f"{value:,.0f}", targets.get(name, "")) for name, value in found.items()
    ]


def gpu(choice: Choice) -> Iterator[Row]:
    """Steps at full size on a GPU, weights made up."""
    for name, command in of_variants(choice.words("gpu", steps=10)):
        if name not in choice.found:
            yield Row(name, outcome(command, choice.limit))


def endurance(choice: Choice) -> Iterator[Row]:
    """Whether many steps with swapped blocks end, and with the adapters of those without; the target is theirs."""
    first, wrong = "", []
    for name, command in of_variants(choice.words("endurance", steps=500)):
        value = choice.found.get(name) or outcome(command, choice.limit)
        if name not in choice.found:
            yield Row(name, value, first)
        first = first or value
        wrong += [name] if value != first else []
    if wrong:
        raise SystemExit(f"not the adapters of the first row: {'; '.join(wrong)}")


def of_variants(words: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """The name of each row, and the command that measures it."""
    for number, name in enumerate(json_of_script("bench_gpu.py", *words)):
        yield name, command_of("bench_gpu.py", *words, "--variant", str(number))


def dataset(_: Choice) -> list[Row]:
    """Finding, reading and caching images."""
    found = json_of_script("bench_dataset.py")
    return [Row(name, f"{found[key]:,.{digits}f}", target) for key, (name, digits, target) in DATASET_ROWS.items()]


DATASET_ROWS: dict[str, tuple[str, int, str]] = {
    "scan_2000": ("scan 2,000 small JPEGs, CPU s", 3, "0.25"),
    "scan_2000_cache_info": ("scan 2,000 with cache_info, CPU s", 3, "0.08"),
    "scan_20000": ("scan 20,000 small JPEGs, CPU s", 2, ""),
    "scan_20000_cache_info": ("scan 20,000 with cache_info, CPU s", 2, ""),
    "decode_ms": ("1.5 Mpx JPEG to 1024-class tensor, CPU ms", 1, "30"),
    "images_per_s_0": ("loader, no worker, images/s", 1, ""),
    "images_per_s_1": ("loader, 1 worker, images/s", 1, ""),
    "images_per_s_2": ("loader, 2 workers, images/s", 1, ""),
    "latent_write_ms": ("SDXL latents, write, CPU ms", 2, ""),
    "latent_read_ms": ("SDXL latents, read, CPU ms", 2, ""),
    "caching_memory_ms": ("latent caching without the VAE, in memory, CPU ms per image", 2, "15"),
    "caching_disk_ms": ("latent caching without the VAE, to disk, CPU ms per image", 2, "15"),
    "caching_again_ms": ("latent cache found on disk, CPU ms per image", 2, ""),
    "boundary_ms": ("epoch boundary with cached latents, ms", 1, "50"),
    "growth_cached_mb": ("memory growth over 5 epochs, cached latents, MB", 1, "0"),
    "growth_pixels_mb": ("memory growth over 5 epochs, images, MB", 1, "0"),
}

BENCHES: dict[str, Callable[[Choice], Iterable[Row]]] = {
    "startup": startup,
    "load": load,
    "order": order,
    "merge": merge,
    "step": step,
    "counts": counts,
    "dataset": dataset,
    "gpu": gpu,
    "endurance": endurance,
}
ON_GPU = ("gpu", "endurance")
FAMILIES = ("sd", "sdxl", "flux")


def json_of_script(script: str, *arguments: str) -> Any:
    """What a measuring script prints at its end."""
    return json.loads(run_script(script, *arguments)[-1])


def run_measured(command: list[str], log: int | None = None) -> tuple[float, float]:
    """Seconds and peak megabytes of a program; the latter is NaN on Windows, which does not tell.

    `log` is where its messages go, those of this program's unless given.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
    if os.name == "nt":
        code, megabytes = process.wait(), float("nan")
    else:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    if code != 0:
        raise SystemExit(f"exit code {code} from {' '.join(command)}")
    return time.perf_counter() - started, megabytes


def commit() -> str:
    """The commit that is measured, marked if there are changes on top of it."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(git, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """Processor, cores, torch."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    versions = f"torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
