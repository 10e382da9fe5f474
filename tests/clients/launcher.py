"""What the processes of `accelerate launch` find in their environment, without starting it."""

from __future__ import annotations

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

STANDARD = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def handed_on(*words: str) -> dict[str, str]:
    """The environment after `accelerate launch words... script.py` for two processes."""
    arguments = launch_command_parser().parse_args([*STANDARD, "--main_process_port", "0", *words, "script.py"])
    environment: dict[str, str] = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return environment
