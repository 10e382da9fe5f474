"""What a folder of diffusers holds beside the weights: classes and sizes of its parts, tokenizer, noise schedule."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from library.models.sd.unet import UNetShape
from library.models.text.clip import TextEncoder

KEPT = ("scheduler", "tokenizer", "feature_extractor")
"""Folders that a model made from a folder takes over as they are."""
INDEX = "model_index.json"


@dataclass(frozen=True)
class FolderParts:
    """The parts of a model that its configuration files speak of; their weights may lie on the meta device."""

    unet: UNetShape
    text_encoder: TextEncoder
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer


def folder_files(parts: FolderParts, base: Path, v_parameterization: bool, zero_terminal_snr: bool) -> dict[str, bytes]:
    """Path in the folder -> content; of a `base` that is a folder of diffusers its own files are kept."""
    made = {
        "unet/config.json": _json(unet_config(parts.unet, v_parameterization)),
        "text_encoder/config.json": _json(text_config(parts.text_encoder)),
        "vae/config.json": parts.vae.to_json_string().encode("utf-8"),
        "scheduler/scheduler_config.json": _json(schedule_config(v_parameterization, zero_terminal_snr)),
    }
    kept = _of_base(base)
    if not any(name.startswith("tokenizer/") for name in kept):
        made |= _tokenizer_files(parts.tokenizer)
    if zero_terminal_snr:  # the base knows nothing of it, and pictures need it
        kept.pop("scheduler/scheduler_config.json", None)
    files = made | kept
    scheduler = json.loads(files["scheduler/scheduler_config.json"])["_class_name"]
    return files | {INDEX: _json(index(scheduler, "feature_extractor/preprocessor_config.json" in files))}


def unet_config(shape: UNetShape, v_parameterization: bool) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel; it calls the number of heads attention_head_dim."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths)]
    same = len(set(shape.num_heads)) == 1
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": diffusers.__version__,
        "act_fn": "silu",
        "attention_head_dim": shape.num_heads[0] if same else list(shape.num_heads),
        "block_out_channels": list(shape.widths),
        "center_input_sample": False,
        "cross_attention_dim": shape.context_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shape.in_channels,
        "layers_per_block": shape.layers_per_level,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": shape.out_channels,
        "sample_size": 96 if v_parameterization else 64,
        "up_block_types": up,
        "use_linear_projection": shape.use_linear,
    }


def text_config(encoder: TextEncoder) -> dict[str, Any]:
    """Of transformers' CLIPTextModel."""
    config: dict[str, Any] = encoder.config.to_diff_dict()
    return config | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


def schedule_config(v_parameterization: bool, zero_terminal_snr: bool) -> dict[str, Any]:
    """The noise that the model was trained with, for DDIM; other schedulers read the same entries."""
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": diffusers.__version__,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v_parameterization else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    # The last step must be the one of pure noise.
    return config | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_terminal_snr else {})


def index(scheduler: str, has_feature_extractor: bool) -> dict[str, Any]:
    """model_index.json: the class of each part. There is no filter of pictures."""
    extractor = ["transformers", "CLIPImageProcessor"] if has_feature_extractor else [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": extractor,
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _of_base(base: Path) -> dict[str, bytes]:
    if not base.is_dir():
        return {}
    files = [file for folder in KEPT for file in sorted((base / folder).glob("*")) if file.is_file()]
    files += [file for part in ("unet", "text_encoder", "vae") if (file := base / part / "config.json").is_file()]
    return {file.relative_to(base).as_posix(): file.read_bytes() for file in files}


def _tokenizer_files(tokenizer: CLIPTokenizer) -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f"tokenizer/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("utf-8")
