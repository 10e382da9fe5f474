"""Trains a LoRA on a small model from nothing: `python tools/quickstart.py [--index-url URL]`.

Needs Python and a network connection for the packages, nothing else. Everything lands in `.venv` and `demo`; running
it again starts the training anew and leaves the rest as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from venv_setup import ROOT, StepFailed, prepare_venv, run_step, shown

DEMO = Path("demo")
LORA = DEMO / "output" / "demo_lora.safetensors"
SHEET = DEMO / "without_and_with_lora.png"
MODEL = ["--pretrained_model_name_or_path", str(DEMO / "small_sd15.safetensors")]
MODEL += ["--tokenizer_cache_dir", str(DEMO / "tokenizers")]

ACCELERATE = (
    "--num_cpu_threads_per_process 1 --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
TRAINING = [
    *MODEL,
    *("--dataset_config", str(DEMO / "dataset.toml")),
    *("--output_dir", str(LORA.parent)),
    *("--output_name", LORA.stem),
    *("--network_module", "networks.lora"),
    *("--network_dim", "8"),
    *("--network_alpha", "8"),
    *("--learning_rate", "3e-3"),
    *("--lr_scheduler", "cosine"),
    *("--optimizer_type", "AdamW"),
    *("--max_train_steps", "60"),
    *("--seed", "1"),
    "--cache_latents",
    "--sdpa",
    *("--sample_prompts", str(DEMO / "prompts.txt")),
    *("--sample_every_n_steps", "20"),
    "--sample_at_first",
    *("--logging_dir", str(DEMO / "logs")),
    *("--log_with", "tensorboard"),
]


def main(words: Sequence[str] | None = None) -> int:
    """Every step from a fresh clone to a sheet of pictures; 1 and a cure if one fails."""
    parser = argparse.ArgumentParser(description="Train a LoRA on a small model, to see that everything works.")
    parser.add_argument(
        "--index-url", help="where pip finds torch, such as https://download.pytorch.org/whl/cu128 for NVIDIA GPUs"
    )
    arguments = parser.parse_args(words)
    try:
        python = str(prepare_venv(["requirements.txt"], arguments.index_url))
        started = time.monotonic()
        make_demo(python)
        command = train(python)
        compare(python)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(report(command, time.monotonic() - started))
    return 0


def make_demo(python: str) -> None:
    """The model, the tokenizer, the pictures and the settings files."""
    cure = f"delete the folder {DEMO} and .venv and run this again; if it stays, please report the message above"
    run_step("make demo files", [python, "tools/demo_files.py", str(DEMO)], cure)


def train(python: str) -> list[str]:
    """Train and return the command one would type for it."""
    cure = "the message above names the cause; close other programs if memory ran out, then run this again"
    for old in (LORA.parent, DEMO / "logs"):  # previews and logs carry their time and would pile up
        shutil.rmtree(ROOT / old, ignore_errors=True)
    # The module is what the command `accelerate` runs; it is found on every system without touching PATH.
    launch = [python, "-m", "accelerate.commands.launch", *ACCELERATE.split(), "train_network.py", *TRAINING]
    run_step("train", launch, cure, env=clean_environment())
    return ["accelerate", "launch", "--num_cpu_threads_per_process", "1", "train_network.py", *TRAINING]


def compare(python: str) -> None:
    """Pictures without and with the LoRA."""
    cure = f"delete {LORA.parent} and run this again; if it stays, please report the message above"
    files = ["--lora", str(LORA), "--prompts", str(DEMO / "prompts.txt"), "--output", str(SHEET)]
    run_step("make pictures", [python, "tools/compare_lora.py", *MODEL, *files], cure, env=clean_environment())


def clean_environment() -> dict[str, str]:
    """The environment without what would send the demo to the hub; messages in UTF-8 on every console."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}


def report(command: Sequence[str], seconds: float) -> str:
    """Where everything is, and how to see it."""
    activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    places = {
        "model": DEMO / "small_sd15.safetensors",
        "pictures": DEMO / "pictures",
        "dataset settings": DEMO / "dataset.toml",
        "trained LoRA": LORA,
        "previews": LORA.parent / "sample",
        "log": DEMO / "logs",
        "without and with": SHEET,
    }
    lines = [f"  {name:17} {ROOT / path}" for name, path in places.items()]
    return "\n".join(
        [
            f"\nDone in {seconds:.0f} s, packages aside.\n",
            *lines,
            f"\nTo train again, or something else (README.md says how):\n  {activate}\n  {shown(command)}",
            "The small model has learnt nothing but noise; the LoRA pulls it towards bright shapes on blue.",
            f"To watch the loss:\n  tensorboard --logdir {DEMO / 'logs'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
