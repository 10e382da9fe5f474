"""Stable Diffusion 1.x and 2.x on disk: where its parts lie, what their keys mean, and reading them into place.

A model is one file in the published layout (`model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`), a
folder of diffusers (`unet/`, `vae/`, `text_encoder/`), or the hub id of such a folder. Its sizes are read off the
shapes of its weights, so pruned and small ones need no configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from library.files.sources import Source, fill_module
from library.files.weights import WeightFile
from library.models import parts
from library.models.attention import AttentionMode
from library.models.parts import part_config
from library.models.sd.layout import unet_shape, unet_sources
from library.models.sd.recognition import check_is_stable_diffusion, warn_of_strangers
from library.models.sd.unet import UNet
from library.models.text.clip import TextEncoder, build_text_encoder, clip_sources, openclip_sources
from library.models.vae.sd import vae_sources

OPENCLIP_PREFIX = "cond_stage_model.model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPENCLIP_LAYERS = 23
"""2.x was trained on the states before the last of its 24 layers, so that layer is left out."""


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


@contextmanager
def opened_part(path: Path, part: str) -> Iterator[WeightFile]:
    """The file that holds unet, text_encoder or vae of the model at `path`, open."""
    with parts.opened_part(path, part, "sd") as file:
        yield file


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
