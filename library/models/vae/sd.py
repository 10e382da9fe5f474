"""The autoencoder of Stable Diffusion 1.x, 2.x and XL, in whatever layout its file has."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

# The narrowest path there is; it still costs 2.4 CPU seconds beside transformers.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from library.files.sources import Source, fill_module
from library.files.unet_names import UNET_PREFIX
from library.files.weight_id import weight_id
from library.files.weights import WeightFile, describe_keys
from library.models.kinds import kind_of
from library.models.parts import opened_part

logger = logging.getLogger(__name__)

LDM_PREFIX = "first_stage_model."
"""Where the autoencoder lies in a whole checkpoint."""
LATENT_CHANNELS = 4


def load_vae(path: Path, family: str, flag: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The autoencoder at `path`, what `flag` names, frozen: in a whole model of `family`, or alone in either layout.

    Raises:
        ValueError: there is none, it is not whole, or it is of another family.
    """
    with opened_part(path, "vae", family) as file:
        return build_vae(_checked_sources(file, flag), dtype, device)


def vae_id(path: Path, family: str) -> str:
    """What names the encoder half of the autoencoder at `path`, in a model of `family` or alone."""
    with opened_part(path, "vae", family) as file:
        return encoder_id(vae_sources(file))


def build_vae(sources: Mapping[str, Source], dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """A frozen autoencoder with the weights `sources`, named as `vae_sources` does; sizes are read off them.

    Raises:
        ValueError: weights are missing, left over or do not fit.
    """
    shapes = {name: source.shape for name, source in sources.items()}
    files = ", ".join(sorted({str(source.file.path) for source in sources.values()})) or "the file"
    widths = _widths(shapes)
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    missing = [name for name in needed if name not in shapes]
    if missing or not widths:
        raise ValueError(
            f"{files}: no autoencoder is in it: {describe_keys(missing or ['encoder.down_blocks'])} missing"
        )
    with torch.device("meta"):
        vae = AutoencoderKL(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=len(_resnets(shapes, 0)),
            latent_channels=shapes["decoder.conv_in.weight"][1],
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
        )
    fill_module(vae, sources, dtype, device)
    return vae.eval().requires_grad_(False)


def vae_sources(file: WeightFile) -> dict[str, Source]:
    """The weights of the autoencoder in `file`, under the names of diffusers' AutoencoderKL.

    `file` may be a whole checkpoint (only `first_stage_model.` is looked at), or an autoencoder alone with the
    published names of either kind, the former names of the attention layers included.

    Raises:
        ValueError: a key belongs to no autoencoder.
    """
    keys = file.keys()
    prefix = LDM_PREFIX if any(key.startswith(LDM_PREFIX) for key in keys) else ""
    own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    own = [name for name in own if not name.startswith(_TRAINING_ONLY)]
    strangers = [name for name in own if not name.startswith(_PARTS)]
    if strangers:
        kind = kind_of(keys)
        what = f"something with the keys {describe_keys(strangers)}" if kind is None else kind.name
        raise ValueError(f"{file.path} is {what}, not an autoencoder; a VAE is needed here")
    numbers = [int(match[1]) for name in own if (match := re.match(r"decoder\.up\.(\d+)\.", name))]
    return {_renamed(name, _NAMES, max(numbers, default=0)): Source(file, prefix + name) for name in own}


def published_vae_layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> its key in the published layout, and the shape of its weight there; `shapes` are under our names.

    The attention of the published layout is made of 1x1 convolutions.
    """
    numbers = [int(match[1]) for name in shapes if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))]
    last_level = max(numbers, default=0)
    layout = {}
    for name, shape in shapes.items():
        is_matrix = len(shape) == 2 and ".attentions." in name
        layout[name] = (_renamed(name, _PUBLISHED_NAMES, last_level), (*shape, 1, 1) if is_matrix else shape)
    return layout


def encoder_id(sources: Mapping[str, Source]) -> str:
    """What names the encoder half of an autoencoder, as `weight_id`.

    The decoder has no part in it, since published autoencoders often share their encoder, and with it the latents.
    """
    return weight_id(sources, lambda name: name.startswith(("encoder.", "quant_conv.")))


def encode(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 4, H/8, W/8], drawn from the posterior.

    An autoencoder whose numbers overflow in float16 goes on in float32, for good.
    """
    posterior = vae.encode(pixels.to(_format(vae))).latent_dist
    if _overflows(vae, posterior.mean):
        posterior = vae.encode(pixels.to(_format(vae))).latent_dist
    latents: Tensor = posterior.sample(generator)
    return latents


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """[B, 4, h, w] as `encode` gives them -> [B, 3, 8h, 8w] in [-1, 1]; overflows as there."""
    pixels: Tensor = vae.decode(latents.to(_format(vae))).sample
    if _overflows(vae, pixels):
        pixels = vae.decode(latents.to(_format(vae))).sample
    return pixels


def _checked_sources(file: WeightFile, flag: str) -> dict[str, Source]:
    keys = file.keys()
    if any(key.startswith(UNET_PREFIX) for key in keys) and not any(key.startswith(LDM_PREFIX) for key in keys):
        raise ValueError(f"{flag}: {file.path} holds no autoencoder; give one with --vae")
    return sources_with(LATENT_CHANNELS, file, file.path, flag, "Stable Diffusion")


def sources_with(channels: int, file: WeightFile, path: Path, flag: str, family: str) -> dict[str, Source]:
    """As `vae_sources`; ValueError when the latents have not as many `channels` as `family` needs."""
    sources = vae_sources(file)
    first = sources.get("decoder.conv_in.weight")
    if first is not None and first.shape[1] != channels:
        raise ValueError(
            f"{flag}: the autoencoder in {path} has {first.shape[1]} latent channels, {family} needs {channels}: it "
            "belongs to another family of models"
        )
    return sources


def _format(vae: AutoencoderKL) -> Tensor:
    """A weight, which has the device and the number format of all."""
    return next(vae.parameters())


def _overflows(vae: AutoencoderKL, values: Tensor) -> bool:
    """Whether `values` are broken and the VAE is in half precision; it is in float32 after that."""
    if _format(vae).dtype != torch.float16 or bool(values.isfinite().all()):
        return False
    logger.warning(
        "the VAE gives values that are not numbers in float16, as that of SDXL does: it goes on in float32 "
        "(--no_half_vae does so from the start)"
    )
    nn.Module.to(vae, torch.float32)  # that of diffusers warns of lists that are empty
    return True


_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TRAINING_ONLY = ("loss.", "model_ema.")

# Published name -> name in diffusers; `{flip}` counts the decoder's levels from the other end.
_NAMES = (
    (r"encoder\.down\.(?P<n>\d+)\.", r"encoder.down_blocks.{n}."),
    (r"decoder\.up\.(?P<n>\d+)\.", r"decoder.up_blocks.{flip}."),
    (r"(?<=\.)block\.(?P<n>\d+)\.", r"resnets.{n}."),
    (r"(?<=\.)downsample\.", r"downsamplers.0."),
    (r"(?<=\.)upsample\.", r"upsamplers.0."),
    (r"(?<=\.)mid\.block_1\.", r"mid_block.resnets.0."),
    (r"(?<=\.)mid\.block_2\.", r"mid_block.resnets.1."),
    (r"(?<=\.)mid\.attn_1\.", r"mid_block.attentions.0."),
    (r"(?<=attentions\.0\.)norm\.", r"group_norm."),
    (r"(?<=attentions\.0\.)(?:q|query)\.", r"to_q."),
    (r"(?<=attentions\.0\.)(?:k|key)\.", r"to_k."),
    (r"(?<=attentions\.0\.)(?:v|value)\.", r"to_v."),
    (r"(?<=attentions\.0\.)(?:proj_out|proj_attn)\.", r"to_out.0."),
    (r"(?<=\.)norm_out\.", r"conv_norm_out."),
    (r"(?<=\.)nin_shortcut\.", r"conv_shortcut."),
)


_PUBLISHED_NAMES = (
    (r"encoder\.down_blocks\.(?P<n>\d+)\.", r"encoder.down.{n}."),
    (r"decoder\.up_blocks\.(?P<n>\d+)\.", r"decoder.up.{flip}."),
    (r"(?<=\.)mid_block\.resnets\.0\.", r"mid.block_1."),
    (r"(?<=\.)mid_block\.resnets\.1\.", r"mid.block_2."),
    (r"(?<=\.)resnets\.(?P<n>\d+)\.", r"block.{n}."),
    (r"(?<=\.)downsamplers\.0\.", r"downsample."),
    (r"(?<=\.)upsamplers\.0\.", r"upsample."),
    (r"(?<=\.)mid_block\.attentions\.0\.", r"mid.attn_1."),
    (r"(?<=attn_1\.)group_norm\.", r"norm."),
    (r"(?<=attn_1\.)to_(?P<n>[qkv])\.", r"{n}."),
    (r"(?<=attn_1\.)to_out\.0\.", r"proj_out."),
    (r"(?<=\.)conv_norm_out\.", r"norm_out."),
    (r"(?<=\.)conv_shortcut\.", r"nin_shortcut."),
)
"""The other way round."""


def _renamed(name: str, table: tuple[tuple[str, str], ...], last_level: int) -> str:
    for pattern, template in table:
        match = re.search(pattern, name)
        if match is not None:
            number = match.groupdict().get("n") or ""
            new = template.format(n=number, flip=last_level - int(number) if number.isdigit() else "")
            name = name[: match.start()] + new + name[match.end() :]
    return name


def _resnets(shapes: Mapping[str, tuple[int, ...]], level: int) -> list[str]:
    pattern = re.compile(rf"encoder\.down_blocks\.{level}\.resnets\.\d+\.conv1\.weight")
    return [name for name in shapes if pattern.fullmatch(name)]


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    widths: list[int] = []
    while f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight" in shapes:
        widths.append(shapes[f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"][0])
    return tuple(widths)
