"""Which settings do not go together, and which follow from others."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WITHOUT_WARMUP = ("constant", "adafactor")


@dataclass(frozen=True)
class Rule:
    """Something about several flags that `holds` only when it is a mistake; its parameters name the flags it reads."""

    name: str
    holds: Callable[..., bool]
    message: str
    """May name the flags it reads in braces."""


MISTAKES = (
    Rule(
        "no base model",
        lambda pretrained_model_name_or_path: not pretrained_model_name_or_path,
        "--pretrained_model_name_or_path is missing: name the model to train, a file, a folder or a hub id",
    ),
    Rule(
        "no network module",
        lambda network_module: not network_module,
        "--network_module is missing: --network_module=networks.lora trains a LoRA",
    ),
    Rule(
        "no output folder", lambda output_dir: not output_dir, "--output_dir is missing: name a folder for the result"
    ),
    Rule(
        "no dataset",
        lambda dataset_config, train_data_dir, in_json, dataset_class: (
            not any((dataset_config, train_data_dir, in_json, dataset_class))
        ),
        "no images: give --dataset_config (a TOML file) or --train_data_dir (a folder of `<repeats>_<words>` folders)",
    ),
    Rule(
        "two sources of images",
        lambda dataset_config, train_data_dir, in_json, dataset_class: bool(
            dataset_class and (dataset_config or train_data_dir or in_json)
        ),
        "--dataset_class={dataset_class} makes the training set by itself: "
        "leave --dataset_config, --train_data_dir and --in_json out",
    ),
    Rule(
        "conditioning images without images",
        lambda conditioning_data_dir, train_data_dir, dataset_config: bool(
            conditioning_data_dir and not train_data_dir and not dataset_config
        ),
        "--conditioning_data_dir needs --train_data_dir, the folder with the images they belong to",
    ),
    Rule(
        "folder without resolution",
        lambda dataset_config, train_data_dir, resolution: bool(
            train_data_dir and not dataset_config and not resolution
        ),
        "--train_data_dir needs --resolution, such as --resolution=512",
    ),
    Rule(
        "adaptive_noise_scale without noise_offset",
        lambda adaptive_noise_scale, noise_offset: adaptive_noise_scale is not None and noise_offset is None,
        "--adaptive_noise_scale needs --noise_offset, which it changes",
    ),
    Rule(
        "velocity loss scaling without v_parameterization",
        lambda scale_v_pred_loss_like_noise_pred, v_parameterization: (
            scale_v_pred_loss_like_noise_pred and not v_parameterization
        ),
        "--scale_v_pred_loss_like_noise_pred needs --v_parameterization",
    ),
    Rule(
        "v_pred_like_loss with v_parameterization",
        lambda v_pred_like_loss, v_parameterization: bool(v_pred_like_loss and v_parameterization),
        "--v_pred_like_loss is for models that predict noise; leave it or --v_parameterization out",
    ),
    Rule(
        "timestep limits crossed",
        lambda min_timestep, max_timestep: (0 if min_timestep is None else min_timestep) >= (max_timestep or 1000),
        "--min_timestep={min_timestep} leaves no timestep below --max_timestep={max_timestep}",
    ),
    Rule(
        "cached latents with random crops",
        lambda cache_latents, random_crop: cache_latents and random_crop,
        "--random_crop needs the pixels at every step: leave it or --cache_latents out",
    ),
    Rule(
        "cached latents with changing colours",
        lambda cache_latents, color_aug: cache_latents and color_aug,
        "--color_aug needs the pixels at every step: leave it or --cache_latents out",
    ),
    Rule(
        "cached latents with crops around faces",
        lambda cache_latents, face_crop_aug_range, enable_bucket: bool(
            cache_latents and face_crop_aug_range and not enable_bucket
        ),
        "--face_crop_aug_range needs the pixels at every step: leave it or --cache_latents out",
    ),
    Rule(
        "full_fp16 without fp16",
        lambda full_fp16, mixed_precision: full_fp16 and mixed_precision != "fp16",
        "--full_fp16 needs --mixed_precision=fp16, which is {mixed_precision}",
    ),
    Rule(
        "full_bf16 without bf16",
        lambda full_bf16, mixed_precision: full_bf16 and mixed_precision != "bf16",
        "--full_bf16 needs --mixed_precision=bf16, which is {mixed_precision}",
    ),
    Rule(
        "warm-up with a schedule that has none",
        lambda lr_warmup_steps, lr_scheduler, lr_scheduler_type: (
            lr_warmup_steps != 0 and (bool(lr_scheduler_type) or lr_scheduler.partition(":")[0] in WITHOUT_WARMUP)
        ),
        "--lr_warmup_steps={lr_warmup_steps} has no meaning for this schedule: "
        "choose --lr_scheduler=constant_with_warmup (or cosine, linear, ...), or --lr_warmup_steps=0",
    ),
    Rule(
        "ranks from no file",
        lambda dim_from_weights, network_weights: dim_from_weights and not network_weights,
        "--dim_from_weights needs --network_weights, the file to take ranks from",
    ),
    Rule(
        "nothing left to train",
        lambda network_train_unet_only, network_train_text_encoder_only: (
            network_train_unet_only and network_train_text_encoder_only
        ),
        "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train; keep one",
    ),
    Rule(
        "more multipliers than base weights",
        lambda base_weights, base_weights_multiplier: len(base_weights_multiplier or ()) > len(base_weights or ()),
        "--base_weights_multiplier has more numbers than --base_weights has files",
    ),
    Rule(
        "TensorBoard without a folder",
        lambda log_with, logging_dir: log_with in ("tensorboard", "all") and not logging_dir,
        "--log_with={log_with} needs --logging_dir, the folder for its files",
    ),
    Rule(
        "wandb is not installed",
        lambda log_with: log_with in ("wandb", "all") and importlib.util.find_spec("wandb") is None,
        "--log_with={log_with} needs the package wandb: pip install wandb",
    ),
    Rule(
        "xformers is not installed",
        lambda xformers: xformers and importlib.util.find_spec("xformers") is None,
        "--xformers needs the package xformers: pip install xformers, or use --sdpa",
    ),
    Rule(
        "persistent workers without workers",
        lambda persistent_data_loader_workers, max_data_loader_n_workers: (
            persistent_data_loader_workers and max_data_loader_n_workers == 0
        ),
        "--persistent_data_loader_workers needs --max_data_loader_n_workers=1 or more",
    ),
    Rule(
        "nothing to resume from the hub",
        lambda resume_from_huggingface, resume: resume_from_huggingface and not resume,
        "--resume_from_huggingface needs --resume=owner/name/folder, where the state lies on the hub",
    ),
    Rule(
        "previews of nothing",
        lambda sample_every_n_steps, sample_every_n_epochs, sample_at_first, sample_prompts: bool(
            (sample_every_n_steps or sample_every_n_epochs or sample_at_first) and not sample_prompts
        ),
        "previews need --sample_prompts, a .txt, .toml or .json file of prompts",
    ),
)

DOUBTS = (
    Rule(
        "crops around faces with buckets",
        lambda face_crop_aug_range, enable_bucket: bool(face_crop_aug_range and enable_bucket),
        "--face_crop_aug_range has no effect with --enable_bucket",
    ),
    Rule(
        "zero_terminal_snr without v_parameterization",
        lambda zero_terminal_snr, v_parameterization: zero_terminal_snr and not v_parameterization,
        "--zero_terminal_snr is made for models that predict velocity (--v_parameterization); "
        "a model that predicts noise learns nothing at the last step",
    ),
    Rule(
        "clip_skip with v2",
        lambda v2, clip_skip: v2 and clip_skip is not None,
        "--clip_skip={clip_skip} is unusual for Stable Diffusion 2.x, whose own choice is the second from the end",
    ),
    Rule(
        "several attentions",
        lambda mem_eff_attn, xformers, sdpa: mem_eff_attn + xformers + sdpa > 1,
        "of several attentions one is used: --mem_eff_attn before --xformers before --sdpa",
    ),
    Rule(
        "random strength of no noise offset",
        lambda noise_offset_random_strength, noise_offset: noise_offset_random_strength and not noise_offset,
        "--noise_offset_random_strength has no effect without --noise_offset",
    ),
    Rule(
        "random strength of no input noise",
        lambda ip_noise_gamma_random_strength, ip_noise_gamma: ip_noise_gamma_random_strength and not ip_noise_gamma,
        "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma",
    ),
    Rule(
        "last epochs of none",
        lambda save_last_n_epochs, save_every_n_epochs, save_n_epoch_ratio: bool(
            save_last_n_epochs and not save_every_n_epochs and not save_n_epoch_ratio
        ),
        "--save_last_n_epochs has no effect without --save_every_n_epochs or --save_n_epoch_ratio",
    ),
    Rule(
        "last steps of none",
        lambda save_last_n_steps, save_every_n_steps: bool(save_last_n_steps and not save_every_n_steps),
        "--save_last_n_steps has no effect without --save_every_n_steps",
    ),
    Rule(
        "last states of none",
        lambda save_last_n_steps_state, save_last_n_epochs_state, save_state: bool(
            (save_last_n_steps_state or save_last_n_epochs_state) and not save_state
        ),
        "--save_last_n_steps_state and --save_last_n_epochs_state have no effect without --save_state",
    ),
    Rule(
        "uploads to nowhere",
        lambda huggingface_repo_id, save_state_to_huggingface, async_upload: bool(
            (save_state_to_huggingface or async_upload) and not huggingface_repo_id
        ),
        "--save_state_to_huggingface and --async_upload have no effect without --huggingface_repo_id",
    ),
)


@dataclass(frozen=True)
class Consequence:
    """When `holds`, `flag` becomes `value`, and the user hears why."""

    name: str
    holds: Callable[..., bool]
    flag: str
    value: Any
    message: str


CONSEQUENCES = (
    Consequence(
        "latents on disk are cached latents",
        lambda cache_latents_to_disk, cache_latents: cache_latents_to_disk and not cache_latents,
        "cache_latents",
        True,
        "--cache_latents_to_disk switches --cache_latents on",
    ),
    Consequence(
        "dataset_config before train_data_dir",
        lambda dataset_config, train_data_dir: bool(dataset_config and train_data_dir),
        "train_data_dir",
        None,
        "--train_data_dir is ignored: --dataset_config says where the images are",
    ),
    Consequence(
        "dataset_config before reg_data_dir",
        lambda dataset_config, reg_data_dir: bool(dataset_config and reg_data_dir),
        "reg_data_dir",
        None,
        "--reg_data_dir is ignored: --dataset_config says where the images are",
    ),
    Consequence(
        "dataset_config before in_json",
        lambda dataset_config, in_json: bool(dataset_config and in_json),
        "in_json",
        None,
        "--in_json is ignored: --dataset_config says where the images are",
    ),
    Consequence(
        "dataset_config before conditioning_data_dir",
        lambda dataset_config, conditioning_data_dir: bool(dataset_config and conditioning_data_dir),
        "conditioning_data_dir",
        None,
        "--conditioning_data_dir is ignored: --dataset_config says where the images are",
    ),
    Consequence(
        "previews every 0 steps",
        lambda sample_every_n_steps: sample_every_n_steps is not None and sample_every_n_steps <= 0,
        "sample_every_n_steps",
        None,
        "--sample_every_n_steps={sample_every_n_steps} makes no previews by steps",
    ),
    Consequence(
        "previews every 0 epochs",
        lambda sample_every_n_epochs: sample_every_n_epochs is not None and sample_every_n_epochs <= 0,
        "sample_every_n_epochs",
        None,
        "--sample_every_n_epochs={sample_every_n_epochs} makes no previews by epochs",
    ),
)


def broken(rules: Sequence[Rule], values: Mapping[str, Any], failed: AbstractSet[str] = frozenset()) -> list[str]:
    """Messages of the rules that hold. A rule about a flag that is not there, or whose value failed, is left out."""
    return [rule.message.format_map(values) for rule in rules if _holds(rule, values, failed)]


def with_consequences(
    values: Mapping[str, Any], failed: AbstractSet[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """The values that follow from the given ones, and a message for each that changed."""
    changed = dict(values)
    messages = []
    for consequence in CONSEQUENCES:
        if _holds(consequence, changed, failed):
            messages.append(consequence.message.format_map(changed))
            changed[consequence.flag] = consequence.value
    return changed, messages


def wrong_number(declared: Field[Any], value: Any) -> str | None:
    """What is wrong with a number that is out of the flag's bounds."""
    low, high = declared.metadata["at_least"], declared.metadata["at_most"]
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and low is not None and not number >= low:
            return f"must be at least {low}, got {number}"
        if number is not None and high is not None and not number <= high:
            return f"must be at most {high}, got {number}"
    return None


def wrong_path(declared: Field[Any], value: Any) -> str | None:
    """What is wrong with a path that leads nowhere, or to the wrong kind of thing."""
    find = {"": _anything, "file": _file, "folder": _folder, "model": _model, "thumbnail": _thumbnail}
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None and (wrong := find[declared.metadata["names"]](str(part))):
            return wrong
    return None


def _holds(rule: Rule | Consequence, values: Mapping[str, Any], failed: AbstractSet[str]) -> bool:
    reads = list(inspect.signature(rule.holds).parameters)
    readable = all(name in values and name not in failed for name in reads)
    return readable and rule.holds(*(values[name] for name in reads))


def _anything(value: str) -> None:
    return None


def _file(value: str) -> str | None:
    if Path(value).is_dir():
        return f"{value} is a folder, but a file is expected"
    return None if Path(value).is_file() else f"there is no file {value}"


def _folder(value: str) -> str | None:
    if Path(value).is_file():
        return f"{value} is a file, but a folder is expected"
    return None if Path(value).is_dir() else f"there is no folder {value}"


def _model(value: str) -> str | None:
    if Path(value).exists() or (HUB_ID.fullmatch(value) and not value.lower().endswith(WEIGHTS)):
        return None
    return f"{value} is neither a file, nor a folder, nor a hub id (owner/name)"


def _thumbnail(value: str) -> str | None:
    return None if value.startswith("data:") else _file(value)
