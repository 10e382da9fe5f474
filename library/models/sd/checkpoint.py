"""Stable Diffusion 1.x and 2.x on disk: where its parts lie, what their keys mean, and reading them into place.

A model is one file in the published layout (`model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`), a
folder of diffusers (`unet/`, `vae/`, `text_encoder/`), or the hub id of such a folder. Its sizes are read off the
shapes of its weights, so pruned and small ones need no configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from library.files import hub
from library.files.weights import WEIGHT_SUFFIXES, Source, WeightFile, fill_module, open_weights
from library.models.attention import AttentionMode
from library.models.sd.families import check_is_stable_diffusion, other_pipeline, warn_of_strangers
from library.models.sd.layout import UNET_PREFIX, unet_shape, unet_sources
from library.models.sd.unet import UNet
from library.models.text.clip import TextEncoder, build_text_encoder, clip_sources, openclip_sources
from library.models.vae.sd import LDM_PREFIX, build_vae, encoder_id, vae_sources

MODEL_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--vae"
LATENT_CHANNELS = 4
OPENCLIP_PREFIX = "cond_stage_model.model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPENCLIP_LAYERS = 23
"""2.x was trained on the states before the last of its 24 layers, so that layer is left out."""


def locate(name: str, flag: str = MODEL_FLAG) -> Path:
    """The file or folder that `name` means; a hub id is fetched.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name; names it and `flag`.
    """
    return hub.locate(name, _hub_files, flag, WEIGHT_SUFFIXES)


def load_unet(
    path: Path,
    v2: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: AttentionMode = AttentionMode.SDPA,
    on_weight: Callable[[str, Tensor], Tensor] | None = None,
) -> UNet:
    """The U-Net of the model at `path`, frozen; `v2` is what the user says it is.

    Raises:
        ValueError: the file is of another family, is not what `v2` says, or does not hold a whole U-Net.
    """
    with opened_part(path, "unet") as file:
        _check_version(path, file, v2)
        if not path.is_dir():
            warn_of_strangers(file)
        sources = unet_sources(file)
        shapes = {name: source.shape for name, source in sources.items()}
        shape = unet_shape(shapes, v2, part_config(path, "unet"), path)
        with torch.device("meta"):
            unet = UNet(shape, attention)
        fill_module(unet, sources, dtype, device, on_weight)
    return unet.eval().requires_grad_(False)


def load_text_encoder(path: Path, v2: bool, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """The text encoder of the model at `path`, frozen.

    Raises:
        ValueError: as `load_unet`.
    """
    with opened_part(path, "unet") as file:
        _check_version(path, file, v2)
    with opened_part(path, "text_encoder") as file:
        sources = text_sources(file, path, v2)
        activation = "gelu" if v2 else "quick_gelu"
        return build_text_encoder(sources, activation, dtype, device, part_config(path, "text_encoder"))


def load_vae(path: Path, dtype: torch.dtype, device: torch.device | str, flag: str = MODEL_FLAG) -> AutoencoderKL:
    """The autoencoder at `path`, frozen: in a whole model, alone in a file of either layout, or in a folder.

    Raises:
        ValueError: there is none, or it is of another family.
    """
    with opened_part(path, "vae") as file:
        keys = file.keys()
        if any(key.startswith(UNET_PREFIX) for key in keys) and not any(key.startswith(LDM_PREFIX) for key in keys):
            raise ValueError(f"{flag}: {path} holds no autoencoder; give one with {VAE_FLAG}")
        sources = vae_sources(file)
        first = sources.get("decoder.conv_in.weight")
        if first is not None and first.shape[1] != LATENT_CHANNELS:
            raise ValueError(
                f"{flag}: the autoencoder in {path} has {first.shape[1]} latent channels, Stable Diffusion needs "
                f"{LATENT_CHANNELS}: it belongs to another family of models"
            )
        return build_vae(sources, dtype, device)


def text_sources(file: WeightFile, path: Path, v2: bool) -> dict[str, Source]:
    """The weights of the text encoder in `file`, the one that holds it of the model at `path`, under our names."""
    if path.is_dir():
        return clip_sources(file)
    return openclip_sources(file, OPENCLIP_PREFIX, OPENCLIP_LAYERS) if v2 else clip_sources(file, CLIP_PREFIX)


@contextmanager
def opened_parts(path: Path, vae: Path | None, v2: bool) -> Iterator[dict[str, dict[str, Source]]]:
    """`unet`, `text_encoder` and `vae` of the model at `path`, the last from `vae` if given: our names -> sources."""
    with ExitStack() as stack:
        unet, text = (stack.enter_context(opened_part(path, part)) for part in ("unet", "text_encoder"))
        pixels = stack.enter_context(opened_part(vae or path, "vae"))
        yield {
            "unet": unet_sources(unet),
            "text_encoder": text_sources(text, path, v2),
            "vae": vae_sources(pixels),
        }


def vae_id(path: Path) -> str:
    """What names the encoder half of the autoencoder at `path`."""
    with opened_part(path, "vae") as file:
        return encoder_id(vae_sources(file))


# What a folder of diffusers calls the weights of a part, in the order of preference.
_WEIGHT_NAMES = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
_WEIGHT_ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")


def _weight_files(part: str) -> list[str]:
    return [stem + ending for ending in _WEIGHT_ENDINGS for stem in _WEIGHT_NAMES[part]]


def _hub_files(files: Sequence[str]) -> list[str]:
    """Of the files of a repository, those that are read: one file of weights for each part, and what is small."""
    chosen = [name for name in files if name.startswith("tokenizer/") or name.endswith(("config.json", "_index.json"))]
    for part in _WEIGHT_NAMES:
        candidates = [f"{part}/{name}" for name in _weight_files(part)]
        # An autoencoder may have a repository of its own.
        candidates += _weight_files(part) if part == "vae" else []
        chosen += [name for name in candidates if name in files][:1]
    return chosen


@contextmanager
def opened_part(path: Path, part: str) -> Iterator[WeightFile]:
    """The file that holds unet, text_encoder or vae of the model at `path`, open."""
    with open_weights(_part_file(path, part)) as file:
        yield file


def _part_file(path: Path, part: str) -> Path:
    """The file that holds `part` of the model at `path`."""
    if not path.is_dir():
        return path
    folders = [path / part, path] if part == "vae" else [path / part]
    for folder in folders:
        for name in _weight_files(part):
            if (folder / name).is_file():
                return folder / name
    problem = other_pipeline(path) or "a folder of diffusers with unet/, vae/ and text_encoder/ is needed"
    raise ValueError(f"{path} holds no {part}/{_weight_files(part)[0]}: {problem}")


def part_config(path: Path, part: str) -> dict[str, Any]:
    """The config.json of a part; empty for a single file, which has none."""
    file = path / part / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return config


def _check_version(path: Path, file: WeightFile, v2: bool) -> None:
    """Raise ValueError unless the U-Net in `file` is of Stable Diffusion 2.x or 1.x, as `v2` says."""
    check_is_stable_diffusion(file, path)
    found = _is_v2(file) or bool(part_config(path, "unet").get("use_linear_projection"))
    if found and not v2:
        raise ValueError(
            f"{path} is a Stable Diffusion 2.x model: add --v2, and --v_parameterization too if it is a 768 version"
        )
    if v2 and not found:
        raise ValueError(f"--v2 is given, but {path} is a Stable Diffusion 1.x model: leave --v2 out")


def _is_v2(file: WeightFile) -> bool:
    keys = file.keys()
    if any(key.startswith(OPENCLIP_PREFIX) for key in keys):
        return True
    if any(key.startswith(CLIP_PREFIX) for key in keys):
        return False
    return any(len(file.shape(key)) == 2 for key in keys if key.endswith(".proj_in.weight"))
