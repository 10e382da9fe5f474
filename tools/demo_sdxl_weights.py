"""What is in a small Stable Diffusion XL checkpoint? Names, shapes and seeded weights in the single-file layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from demo_checkpoint import (
    Shapes,
    Sizes,
    UNetSizes,
    denoiser_shapes,
    drawn,
    let_the_unet_start_from_its_input,
    let_the_vae_copy_colours,
    text_shapes,
    vae_shapes,
)

LATENT_GAIN = 1 / 0.13025
"""The published scaling factor brings latents of this size to unit variance."""
SIZE_NUMBERS = 6 * 256
"""Width of what tells the six sizes."""
CLIP = "conditioner.embedders.0.transformer."
OPENCLIP = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class SdxlSizes:
    """The widths of the small model; everything else is as published."""

    unet: tuple[int, int, int] = (32, 64, 64)
    depths: tuple[int, int, int] = (0, 1, 2)
    """Transformer blocks of each level; the middle block has as many as the last."""
    clip: int = 64
    """Width of the first text encoder, a multiple of 64: a head has 64 channels."""
    clip_layers: int = 2
    openclip: int = 128
    """Width of the second text encoder, likewise, and of the pooled text."""
    openclip_layers: int = 2
    vocabulary: int = 1000
    vae: int = 32


def small_sdxl_checkpoint(sizes: SdxlSizes, seed: int = 0) -> dict[str, Tensor]:
    """Every weight of the model as float32, the same for the same `sizes` and `seed`."""
    tensors = {key: drawn(key, shape, seed) for key, shape in sdxl_shapes(sizes).items()}
    tensors[f"{OPENCLIP}logit_scale"] = torch.tensor(4.6052)
    tensors[f"{CLIP}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    vae = {key.removeprefix("first_stage_model."): value for key, value in tensors.items() if "first_stage" in key}
    let_the_vae_copy_colours(vae, LATENT_GAIN)
    let_the_unet_start_from_its_input(tensors, sizes.unet)
    return tensors


def sdxl_shapes(sizes: SdxlSizes) -> Shapes:
    """Every weight that is drawn, all but the logit scale and the position ids."""
    unet = UNetSizes(
        sizes.unet,
        sizes.depths,
        mid_depth=sizes.depths[-1],
        text=sizes.clip + sizes.openclip,
        vector=sizes.openclip + SIZE_NUMBERS,
        linear=True,
    )
    others = Sizes(text=sizes.clip, text_layers=sizes.clip_layers, vocabulary=sizes.vocabulary, vae=sizes.vae)
    return denoiser_shapes(unet) | text_shapes(others, CLIP) | openclip_shapes(sizes) | vae_shapes(others)


def openclip_shapes(sizes: SdxlSizes) -> Shapes:
    """The second text encoder, in the layout of OpenCLIP."""
    width = sizes.openclip
    shapes: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "token_embedding.weight": (sizes.vocabulary, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for index in range(sizes.openclip_layers):
        block = f"transformer.resblocks.{index}"
        shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        layers = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, shape in layers.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return {OPENCLIP + name: shape for name, shape in shapes.items()}
