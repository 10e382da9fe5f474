"""`accelerate launch` on the CPU, and what its processes find in their environment, without starting it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ("-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
ONE_PROCESS = (*LAUNCH, "--num_processes=1")
TWO_PROCESSES = (
    *LAUNCH,
    "--multi_gpu",
    "--num_processes=2",
    "--main_process_port=0",
    "--num_cpu_threads_per_process=1",
)
STANDARD = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def handed_on(*words: str) -> dict[str, str]:
    """The environment after `accelerate launch words... script.py` for two processes."""
    arguments = launch_command_parser().parse_args([*STANDARD, "--main_process_port", "0", *words, "script.py"])
    environment: dict[str, str] = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return environment


def said_by(*words: str, environment: Mapping[str, str] = os.environ, given: str = "") -> str:
    """All that `python words...` says, in the root of the project, on the CPU, without the hub; it must succeed."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**environment, **own},
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout
