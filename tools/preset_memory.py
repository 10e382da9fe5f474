"""How much memory does each preset in configs/ need? `python tools/preset_memory.py --write` puts it into them."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from demo_flux_folder import T5_FOLDER, write_t5_tokenizer
from demo_pictures import words
from demo_sdxl_folder import write_clip_tokenizers
from header_only import write_hollow_checkpoint

ROOT = Path(__file__).resolve().parents[1]

MODEL = "pretrained_model_name_or_path"


@dataclass(frozen=True)
class Family:
    """What the presets of a family are for."""

    script: str
    files: Mapping[str, str]
    """Flag -> the published file that it names."""
    side: int
    """Of a picture, in pixels."""


FAMILIES = {
    "sd15": Family("train_network.py", {MODEL: "sd15"}, 512),
    "sd15db": Family("train_db.py", {MODEL: "sd15"}, 512),
    "sdxl": Family("sdxl_train_network.py", {MODEL: "sdxl_base"}, 1024),
    "flux": Family(
        "flux_train_network.py", {MODEL: "flux_dev", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "flux_ae"}, 1024
    ),
}
"""Start of a preset's name -> its family."""
MARK = "# memory by --dry_run"
NUM_PICTURES = 8


def main() -> int:
    """Print the rows of each preset, or bring its comment up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the numbers into the presets")
    write = parser.parse_args().write
    for preset in sorted((ROOT / "configs").glob("*.toml")):
        rows = measured(preset, FAMILIES[preset.stem.partition("_")[0]])
        print(preset.name, *rows, sep="\n")
        if write:
            text = preset.read_text(encoding="utf-8")
            preset.write_text(with_comment(text, rows), encoding="utf-8", newline="\n")
    return 0


def with_comment(text: str, rows: list[str]) -> str:
    """The preset with `rows` under the mark at its end."""
    lines = "".join(f"#{row}\n" for row in rows)
    about = "on a published checkpoint and square pictures; a GPU takes 0.6 GB more for itself"
    return f"{text.partition(MARK)[0]}{MARK}, {about}:\n{lines}"


def measured(preset: Path, family: Family) -> list[str]:
    """The rows of the memory table of a dry run on pictures of the preset's resolution."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for flag, facts in family.files.items():
            write_hollow_checkpoint(folder / f"{facts}.safetensors", facts)
            files += [f"--{flag}", str(folder / f"{facts}.safetensors")]
        write_clip_tokenizers(folder, words())
        write_t5_tokenizer(folder / T5_FOLDER, words())
        pictures = folder / "images" / "1_picture"
        pictures.mkdir(parents=True)
        for number in range(NUM_PICTURES):
            Image.new("RGB", (family.side, family.side)).save(pictures / f"{number}.png")
        command = [
            *(sys.executable, family.script, *files, "--dry_run", "--config_file", str(preset), "--console_log_simple"),
            *("--tokenizer_cache_dir", str(folder), "--train_data_dir", str(folder / "images")),
            *("--output_dir", str(folder / "out")),
        ]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{preset.name}: {done.stderr[-2000:]}")
    table = re.search(r"^memory\n((?:  .*\n)+)", done.stderr, re.MULTILINE)
    assert table is not None, done.stderr
    return [row.rstrip() for row in table[1].splitlines()]


if __name__ == "__main__":
    sys.exit(main())
