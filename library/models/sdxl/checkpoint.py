"""Stable Diffusion XL on disk: where its parts lie, and reading them into place.

A model is one file in the published layout (`model.diffusion_model.`, `conditioner.embedders.0.` and `.1.`,
`first_stage_model.`), a folder of diffusers (`unet/`, `text_encoder/`, `text_encoder_2/`, `vae/`), or the hub id of
such a folder. Its sizes are read off the shapes of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from library.files.sources import Source, fill_module
from library.files.unet_names import UNET_PREFIX
from library.files.weight_id import weight_id
from library.files.weights import WeightFile, describe_keys
from library.models.attention import AttentionMode
from library.models.kinds import kind_of
from library.models.parts import opened_part
from library.models.sdxl.layout import (
    FOLDER_FIRST_KEY,
    first_encoder_sources,
    second_encoder_sources,
    unet_shape,
    unet_sources,
)
from library.models.sdxl.pooled_text import PooledTextEncoder
from library.models.sdxl.unet import SdxlUNet
from library.models.text.clip import TextEncoder, build_text_encoder
from library.models.vae.sd import LATENT_CHANNELS

FAMILY = "sdxl"


def load_unet(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: AttentionMode = AttentionMode.SDPA,
    on_weight: Callable[[str, Tensor], Tensor] | None = None,
) -> SdxlUNet:
    """The U-Net of the model at `path`, frozen.

    Raises:
        ValueError: the file is of another family, or does not hold a whole U-Net.
    """
    with opened_part(path, "unet", FAMILY) as file:
        _check_family(path, file)
        sources = unet_sources(file)
        shape = unet_shape({name: source.shape for name, source in sources.items()}, path)
        with torch.device("meta"):
            unet = SdxlUNet(shape, attention)
        fill_module(unet, sources, dtype, device, on_weight)
    return unet.eval().requires_grad_(False)


def load_text_encoders(
    path: Path, end_token: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[TextEncoder, PooledTextEncoder]:
    """CLIP-L and OpenCLIP bigG of the model at `path`, frozen; `end_token` is the end mark of the second's tokenizer.

    Raises:
        ValueError: as `load_unet`.
    """
    with opened_part(path, "unet", FAMILY) as file:
        _check_family(path, file)
    with opened_part(path, "text_encoder", FAMILY) as file:
        first = build_text_encoder(first_encoder_sources(file), "quick_gelu", dtype, device)
    with opened_part(path, "text_encoder_2", FAMILY) as file:
        sources, projection, is_linear = second_encoder_sources(file)
        text_model = build_text_encoder(sources, "gelu", dtype, device)
        if projection is None:
            raise ValueError(f"{file.path}: the second text encoder is not whole: text_projection is missing")
        matrix = torch.empty(projection.shape, dtype=dtype, device=device)
        if matrix.device.type != "meta":
            matrix.copy_(projection.read())
    second = PooledTextEncoder(text_model, matrix.t().contiguous() if is_linear else matrix, end_token)
    return first, second.eval().requires_grad_(False)


def text_encoder_id(path: Path) -> str:
    """What names the weights of both text encoders of the model at `path`."""
    with opened_part(path, "text_encoder", FAMILY) as file:
        first = weight_id(first_encoder_sources(file))
    with opened_part(path, "text_encoder_2", FAMILY) as file:
        sources: dict[str, Source] = second_encoder_sources(file)[0]
        return f"{first}-{weight_id(sources)}"


def _check_family(path: Path, file: WeightFile) -> None:
    """Raise ValueError unless `file`, of the model at `path`, is of this family and takes plain latents."""
    keys = file.keys()
    kind = kind_of(keys)
    if kind is None:
        raise ValueError(f"{path} is no Stable Diffusion XL model; it holds {describe_keys(keys, 3)}")
    if FAMILY not in kind.families:
        raise ValueError(f"{path} is {kind.name}, not Stable Diffusion XL: {kind.cure}")
    if FOLDER_FIRST_KEY in keys and not path.is_dir():
        raise ValueError(f"{path} is the U-Net of a diffusers folder: give the folder that has model_index.json")
    first = next((key for key in (UNET_PREFIX + "input_blocks.0.0.weight", FOLDER_FIRST_KEY) if key in keys), None)
    if first is not None and file.shape(first)[1] != LATENT_CHANNELS:
        raise ValueError(
            f"{path} takes {file.shape(first)[1]} input channels where Stable Diffusion XL takes {LATENT_CHANNELS}: "
            "it is made for inpainting or the like, and cannot be trained here"
        )
