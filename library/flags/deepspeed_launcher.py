"""What `accelerate launch --use_deepspeed` was told, said with the flags of a script."""

import os
from collections.abc import Mapping

SWITCH = "ACCELERATE_USE_DEEPSPEED"
ACCUMULATION, CLIPPING = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FLAGS: Mapping[str, str] = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero3_save_16bit_model",
}
"""Variable that the launcher tells its processes -> flag."""
OFF = ("none", "false")


def launches(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher uses DeepSpeed."""
    return environment.get(SWITCH, "").lower() == "true"


def words_of_launcher(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command line that asks for what the launcher was asked for; empty when it does not use DeepSpeed."""
    if not launches(environment):
        return []
    said = {flag: environment[name].lower() for name, flag in FLAGS.items() if name in environment}
    return [
        "--deepspeed",
        *(f"--{flag}" if value == "true" else f"--{flag}={value}" for flag, value in said.items() if value not in OFF),
    ]


def has_config_file(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher names a file of DeepSpeed's own."""
    return launches(environment) and environment.get(CONFIG_FILE, "none").lower() not in OFF


def differs(name: str, value: float, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher uses DeepSpeed and has another number than `value` in the variable `name`."""
    said = environment.get(name, "auto") if launches(environment) else "auto"
    try:
        return float(said) != value
    except ValueError:  # auto, or none
        return False
