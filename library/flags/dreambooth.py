"""Training a whole model: which flags train_db.py has of its own, and which shared ones mean something else there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.flags.declare import flag
from library.flags.fsdp_launcher import divides
from library.flags.rules.rule import Consequence, Rule, Rules
from library.flags.trainers import TRAINER


@dataclass(frozen=True)
class DreamBoothFlags:
    """DreamBooth"""

    learning_rate_te: float | None = flag(
        None, "learning rate of the text encoder; learning_rate unless given", at_least=0
    )
    stop_text_encoder_training: int | None = flag(
        None, "train the text encoder for this many steps only; -1 leaves it as it is", at_least=-1
    )
    no_token_padding: bool = flag(False, "rows of tokens as long as the longest caption of the batch, not of 77")
    use_safetensors: bool = flag(
        False, "a .safetensors file, or a folder of them, where save_model_as says ckpt or diffusers"
    )


TRAIN_DB: tuple[type, ...] = (DreamBoothFlags, *TRAINER)

FILE_KINDS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")
DB_CHOICES: Mapping[str, tuple[Any, ...]] = {"save_model_as": (None, *FILE_KINDS)}
DB_DEFAULTS: Mapping[str, Any] = {"save_model_as": None}

TRAINED_WHOLE = "every weight of the model is trained, so none can be held in float8"
DB_IDLE: Mapping[str, str] = {"fp8_base": TRAINED_WHOLE, "fp8_base_unet": TRAINED_WHOLE}
"""Flags without effect here, and why."""

DB_ABSENT: Mapping[str, str] = {
    "unet_lr": "the U-Net is trained with --learning_rate",
    "text_encoder_lr": "the text encoder's rate is --learning_rate_te",
    "no_metadata": "a checkpoint holds no description of its training; modelspec entries are always there",
    "training_comment": "a checkpoint holds no description of its training; there is --metadata_description",
}
"""Flags of shared groups that this script does not take, and what to do instead."""


def is_file(name: str | None) -> bool:
    """Whether the base model is a single file, not a folder of diffusers or the hub id of one."""
    return name is not None and Path(name).is_file()


DB_RULES = Rules(
    mistakes=(
        Rule(
            "rows of several lengths",
            lambda no_token_padding, max_token_length: no_token_padding and max_token_length is not None,
            "--no_token_padding reads one row of at most 75 tokens: leave it or "
            "--max_token_length={max_token_length} out",
        ),
        Rule(
            "a rate for a text encoder that is not trained",
            lambda learning_rate_te, stop_text_encoder_training: bool(
                learning_rate_te and stop_text_encoder_training is not None and stop_text_encoder_training <= 0
            ),
            "--learning_rate_te={learning_rate_te} is for the text encoder, which "
            "--stop_text_encoder_training={stop_text_encoder_training} does not train: leave one of them out",
        ),
        Rule(
            "a whole model in parts",
            lambda max_train_steps: divides(),
            "accelerate was launched with FSDP, which divides the frozen weights of a LoRA training; here all weights "
            "are trained, whole in every process: launch with --multi_gpu; --deepspeed divides what the optimizer "
            "holds, and --fused_backward_pass keeps no gradients",
        ),
    ),
    doubts=(
        Rule(
            "a stop after the end",
            lambda stop_text_encoder_training, max_train_steps, max_train_epochs: (
                max_train_epochs is None and (stop_text_encoder_training or 0) >= max_train_steps
            ),
            "--stop_text_encoder_training={stop_text_encoder_training} has no effect: "
            "the run ends after --max_train_steps={max_train_steps}",
        ),
    ),
    consequences=(
        Consequence(
            "a file of a file",
            lambda save_model_as, use_safetensors, pretrained_model_name_or_path: (
                save_model_as is None and not use_safetensors and is_file(pretrained_model_name_or_path)
            ),
            "save_model_as",
            "ckpt",
            "the model will be a .ckpt file, as the base is a file; --save_model_as=safetensors is the safer kind",
        ),
        Consequence(
            "a safetensors file of a file",
            lambda save_model_as, use_safetensors, pretrained_model_name_or_path: (
                use_safetensors
                and (save_model_as == "ckpt" or (save_model_as is None and is_file(pretrained_model_name_or_path)))
            ),
            "save_model_as",
            "safetensors",
            "--use_safetensors: the model will be a .safetensors file",
        ),
        Consequence(
            "a folder of a folder",
            lambda save_model_as, use_safetensors: save_model_as is None and not use_safetensors,
            "save_model_as",
            "diffusers",
            "the model will be a folder of diffusers with .bin files, as the base is such a folder; "
            "--save_model_as=diffusers_safetensors is the safer kind",
        ),
        Consequence(
            "a safetensors folder of a folder",
            lambda save_model_as, use_safetensors: use_safetensors and save_model_as in (None, "diffusers"),
            "save_model_as",
            "diffusers_safetensors",
            "--use_safetensors: the model will be a folder of diffusers with .safetensors files",
        ),
    ),
)
