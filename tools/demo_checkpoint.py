"""What is in a small Stable Diffusion 1.x checkpoint? Names, shapes and seeded weights in the single-file layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

LATENT_GAIN = 1 / 0.18215
"""The published scaling factor brings latents of this size to unit variance."""


@dataclass(frozen=True)
class Sizes:
    """The widths of the small model; everything else is as published."""

    unet: tuple[int, int, int, int] = (32, 64, 64, 64)
    text: int = 64
    """Width of the text encoder, a multiple of 64: a head has 64 channels."""
    text_layers: int = 2
    vocabulary: int = 1000
    vae: int = 32
    """Width of the VAE on every level; one channel per group of its 32 group norms."""


@dataclass(frozen=True)
class UNetSizes:
    """What decides the weights of a denoiser; one entry per level, from full resolution down."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    """Transformer blocks after each residual block; 0 for a level that does not see the text."""
    mid_depth: int
    text: int
    """Width of the text that it sees."""
    vector: int = 0
    """Width of the vector that tells sizes and the pooled text, if there is one."""
    linear: bool = False
    """The layers around a transformer are linear, not convolutions."""


def small_checkpoint(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Every weight of the model as float32, the same for the same `sizes` and `seed`."""
    shapes = {**unet_shapes(sizes), **text_shapes(sizes), **vae_shapes(sizes)}
    tensors = {key: drawn(key, shape, seed) for key, shape in shapes.items()}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    vae = {key.removeprefix("first_stage_model."): value for key, value in tensors.items() if "first_stage" in key}
    let_the_vae_copy_colours(vae, LATENT_GAIN)
    let_the_unet_start_from_its_input(tensors, sizes.unet)
    return tensors


def unet_shapes(sizes: Sizes) -> Shapes:
    """The denoiser of Stable Diffusion 1.x, `model.diffusion_model.*`."""
    return denoiser_shapes(UNetSizes(sizes.unet, depths=(1, 1, 1, 0), mid_depth=1, text=sizes.text))


def denoiser_shapes(sizes: UNetSizes) -> Shapes:
    """Every weight of a denoiser, `model.diffusion_model.*`."""
    widths, time = sizes.widths, 4 * sizes.widths[0]
    shapes: Shapes = {}

    def add(block: str, layers: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        shapes.update({f"model.diffusion_model.{block}.{name}": shape for name, shape in layers})

    def add_residual_and_transformer(block: str, inner: int, outer: int, depth: int) -> None:
        add(f"{block}.0", _residual(inner, outer, time))
        if depth:
            add(f"{block}.1", _transformer(outer, sizes.text, depth, sizes.linear))

    add("time_embed", _two_layers(time, widths[0]))
    if sizes.vector:
        add("label_emb.0", _two_layers(time, sizes.vector))
    add("input_blocks.0.0", _layer(widths[0], 4, 3, 3))
    skips, width, index, last = [widths[0]], widths[0], 0, len(widths) - 1
    for level, wide in enumerate(widths):
        for _ in range(2):
            index += 1
            add_residual_and_transformer(f"input_blocks.{index}", width, wide, sizes.depths[level])
            width = wide
            skips.append(width)
        if level < last:
            index += 1
            add(f"input_blocks.{index}.0.op", _layer(width, width, 3, 3))
            skips.append(width)
    add_residual_and_transformer("middle_block", width, width, sizes.mid_depth)
    add("middle_block.2", _residual(width, width, time))
    for index in range(3 * len(widths)):
        level = last - index // 3
        depth = sizes.depths[level]
        add_residual_and_transformer(f"output_blocks.{index}", width + skips.pop(), widths[level], depth)
        width = widths[level]
        if index % 3 == 2 and level > 0:
            add(f"output_blocks.{index}.{2 if depth else 1}.conv", _layer(width, width, 3, 3))
    add("out.0", _layer(width))
    add("out.2", _layer(4, width, 3, 3))
    return shapes


def text_shapes(sizes: Sizes, prefix: str = "cond_stage_model.transformer.") -> Shapes:
    """The text encoder, `text_model.*` behind `prefix`, without its position ids."""
    root, width = f"{prefix}text_model", sizes.text
    shapes: Shapes = {
        f"{root}.embeddings.token_embedding.weight": (sizes.vocabulary, width),
        f"{root}.embeddings.position_embedding.weight": (77, width),
    }
    layers = {f"self_attn.{part}_proj": _layer(width, width) for part in ("k", "v", "q", "out")}
    layers |= {"layer_norm1": _layer(width), "mlp.fc1": _layer(4 * width, width), "mlp.fc2": _layer(width, 4 * width)}
    layers |= {"layer_norm2": _layer(width)}
    parts = [(f"{layer}.{name}", shape) for layer, rows in layers.items() for name, shape in rows]
    for index in range(sizes.text_layers):
        shapes |= {f"{root}.encoder.layers.{index}.{name}": shape for name, shape in parts}
    return shapes | {f"{root}.final_layer_norm.{name}": shape for name, shape in _layer(width)}


def vae_shapes(sizes: Sizes) -> Shapes:
    """The autoencoder, `first_stage_model.*`."""
    width, shapes = sizes.vae, Shapes()

    def add(block: str, layers: Iterator[tuple[str, tuple[int, ...]]]) -> None:
        shapes.update({f"first_stage_model.{block}.{name}": shape for name, shape in layers})

    for side, inner, outer in (("encoder", 3, 8), ("decoder", 4, 3)):
        add(f"{side}.conv_in", _layer(width, inner, 3, 3))
        add(f"{side}.mid.block_1", _vae_residual(width))
        add(f"{side}.mid.attn_1.norm", _layer(width))
        for part in ("q", "k", "v", "proj_out"):
            add(f"{side}.mid.attn_1.{part}", _layer(width, width, 1, 1))
        add(f"{side}.mid.block_2", _vae_residual(width))
        for level in range(4):
            name = f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"
            for block in range(2 if side == "encoder" else 3):
                add(f"{name}.block.{block}", _vae_residual(width))
            if side == "encoder" and level < 3:
                add(f"{name}.downsample.conv", _layer(width, width, 3, 3))
            if side == "decoder" and level > 0:
                add(f"{name}.upsample.conv", _layer(width, width, 3, 3))
        add(f"{side}.norm_out", _layer(width))
        add(f"{side}.conv_out", _layer(outer, width, 3, 3))
    add("quant_conv", _layer(8, 8, 1, 1))
    add("post_quant_conv", _layer(4, 4, 1, 1))
    return shapes


def _layer(*shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "weight", shape
    yield "bias", shape[:1]


def _named(**layers: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer, rows in layers.items():
        yield from ((f"{layer.replace('__', '.')}.{name}", shape) for name, shape in rows)


def _residual(inner: int, outer: int, time: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _named(
        in_layers__0=_layer(inner),
        in_layers__2=_layer(outer, inner, 3, 3),
        emb_layers__1=_layer(outer, time),
        out_layers__0=_layer(outer),
        out_layers__3=_layer(outer, outer, 3, 3),
    )
    if inner != outer:
        yield from _named(skip_connection=_layer(outer, inner, 1, 1))


def _two_layers(outer: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("0." + name, shape) for name, shape in _layer(outer, inner))
    yield from (("2." + name, shape) for name, shape in _layer(outer, outer))


def _transformer(width: int, text: int, depth: int, linear: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    side = (width, width) if linear else (width, width, 1, 1)
    yield from _named(norm=_layer(width), proj_in=_layer(*side), proj_out=_layer(*side))
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        for attention, source in (("attn1", width), ("attn2", text)):
            for part, inner in (("to_q", width), ("to_k", source), ("to_v", source)):
                yield f"{block}.{attention}.{part}.weight", (width, inner)
            yield from ((f"{block}.{attention}.to_out.0.{name}", shape) for name, shape in _layer(width, width))
        for name, shape in (("ff.net.0.proj", (8 * width, width)), ("ff.net.2", (width, 4 * width))):
            yield from ((f"{block}.{name}.{part}", rows) for part, rows in _layer(*shape))
        for norm in ("norm1", "norm2", "norm3"):
            yield from ((f"{block}.{norm}.{name}", shape) for name, shape in _layer(width))


def _vae_residual(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _named(
        norm1=_layer(width),
        conv1=_layer(width, width, 3, 3),
        norm2=_layer(width),
        conv2=_layer(width, width, 3, 3),
    )


def drawn(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Norms near the identity, small biases, matrices that keep the size of what passes through them."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.05 * values if key.endswith("weight") else 0.02 * values
    return values / math.sqrt(math.prod(shape[1:]))


def let_the_vae_copy_colours(vae: Mapping[str, Tensor], gain: float) -> None:
    """Make latents of averaged colours times `gain`, and pictures of smoothed latents, so that they can be looked at.

    Residual blocks and attention add nothing. Channels 0 to 2 carry red, green and blue through the network, 3 their
    mean, and 4 to 7 the same with the sign turned: silu(x) - silu(-x) = x undoes the activation before the last layer.
    The group norm before it has one channel a group, so that pictures keep their colours relative to their mean.
    Latents beyond the fourth are 0.
    """
    for key, value in vae.items():
        last = ".conv2." in key or ".proj_out." in key
        if last or key.endswith("bias") or "norm" in key or ".conv_" in key or "sample" in key or "quant" in key:
            value.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
    signs = torch.tensor([1.0, -1.0])
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]])
    vae["encoder.conv_in.weight"][:8, :, 1, 1] = (signs[:, None, None] * colours).reshape(8, 3)
    vae["decoder.conv_in.weight"][:8, :4, 1, 1] = (signs[:, None, None] * torch.eye(4)).reshape(8, 4) / gain
    width, smooth = len(vae["encoder.conv_in.weight"]), torch.tensor([0.25, 0.5, 0.25])
    for key, value in vae.items():
        if key.endswith("downsample.conv.weight"):
            value[range(width), range(width), :2, :2] = 0.25
        if key.endswith("upsample.conv.weight"):
            value[range(width), range(width)] = smooth[:, None] * smooth
    for channel in range(4):
        vae["encoder.conv_out.weight"][channel, [channel, channel + 4], 1, 1] = gain * signs
    for channel in range(3):
        vae["decoder.conv_out.weight"][channel, [channel, channel + 4], 1, 1] = 0.5 * signs
    moments = "quant_conv" if "quant_conv.bias" in vae else "encoder.conv_out"
    logvar = vae[f"{moments}.bias"]
    logvar[len(logvar) // 2 :] = -10.0  # the log of the variance: encoding is almost without chance
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" in vae:
            vae[f"{name}.weight"][:, :, 0, 0] = torch.eye(len(vae[f"{name}.weight"]))


def let_the_unet_start_from_its_input(tensors: Mapping[str, Tensor], widths: tuple[int, ...]) -> None:
    """Make the untrained answer mostly the input itself: the best guess of the noise while there is much of it.

    The first layer's output reaches the last block as a skip; what the layers in between add stays small.
    """
    unet = {key.removeprefix("model.diffusion_model."): value for key, value in tensors.items()}
    width, last = widths[0], f"output_blocks.{3 * len(widths) - 1}"
    pairs = torch.cat([torch.eye(4), -torch.eye(4)])
    unet["input_blocks.0.0.weight"][:8] = 0
    unet["input_blocks.0.0.weight"][:8, :, 1, 1] = pairs
    skip = unet[f"{last}.0.skip_connection.weight"]
    skip[:8] = 0
    skip[range(8), range(width, width + 8)] = 1.0
    for layer in (f"{last}.0.out_layers.3.weight", f"{last}.1.proj_out.weight"):
        if layer in unet:
            unet[layer][:8] *= 0.1
    unet["out.2.weight"].mul_(0.3)
    unet["out.2.weight"][:, :8, 1, 1] += 0.9 * pairs.T
