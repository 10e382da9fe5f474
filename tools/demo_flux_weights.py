"""What is in a small FLUX.1 or Chroma model? Names, shapes and seeded weights in the published single-file layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from demo_checkpoint import Shapes, Sizes, drawn, let_the_vae_copy_colours, text_shapes, vae_shapes

LATENT_CHANNELS = 16
LATENT_GAIN = 1 / 0.3611
LATENT_SHIFT = 0.1159
"""Published latents are `(z - shift) / gain`, of unit variance."""
TIME = 256
CHROMA_INPUTS = 64


@dataclass(frozen=True)
class FluxSizes:
    """The widths of the small model; everything else is as published."""

    width: int = 128
    """Of the transformer, at least twice the 64 numbers of a patch."""
    heads: int = 4
    double_blocks: int = 2
    single_blocks: int = 2
    clip: int = 64
    t5: int = 32
    t5_heads: int = 2
    t5_layers: int = 2
    approximator: int = 64
    """Of the layer that makes all modulations of Chroma."""
    vae: int = 32
    clip_vocabulary: int = 1000
    t5_vocabulary: int = 1000


def small_transformer(sizes: FluxSizes, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """FLUX.1 "dev" or "schnell", or "chroma": float32, the same for the same arguments.

    Untrained it answers mostly with its input, the best guess of the velocity while there is much noise.
    """
    tensors = {key: drawn(key, shape, seed) for key, shape in transformer_shapes(sizes, kind).items()}
    patch = 4 * LATENT_CHANNELS
    eye, width = torch.eye(patch), sizes.width
    tensors["img_in.weight"].zero_()
    tensors["img_in.weight"][:patch], tensors["img_in.weight"][patch : 2 * patch] = eye, -eye
    tensors["final_layer.linear.weight"].zero_()
    scale = 0.5 * (2 * patch / width) ** 0.5  # the norm before it makes the mean square of all channels 1
    tensors["final_layer.linear.weight"][:, :patch] = scale * eye
    tensors["final_layer.linear.weight"][:, patch : 2 * patch] = -scale * eye
    for key, value in tensors.items():
        if key.startswith("final_layer.adaLN") or (key.endswith("bias") and "_in" not in key):
            value.zero_()
        if key.endswith(("attn.proj.weight", "mlp.2.weight", "linear2.weight", "guidance_layer.out_proj.weight")):
            value *= 0.3
    return tensors


def small_clip(sizes: FluxSizes, seed: int = 0) -> dict[str, Tensor]:
    """CLIP-L, `text_model.*`."""
    shapes = text_shapes(Sizes(text=sizes.clip, vocabulary=sizes.clip_vocabulary))
    root = "cond_stage_model.transformer."
    return {key.removeprefix(root): drawn(key, shape, seed) for key, shape in shapes.items()}


def small_t5(sizes: FluxSizes, seed: int = 0) -> dict[str, Tensor]:
    """The encoder of T5, `shared.weight` and `encoder.*`."""
    tensors = {key: drawn(key, shape, seed) for key, shape in t5_shapes(sizes).items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    return tensors


def small_autoencoder(sizes: FluxSizes, seed: int = 0) -> dict[str, Tensor]:
    """The autoencoder, which copies averaged colours into the first of its 16 channels."""
    root = "first_stage_model."
    shapes = {
        key.removeprefix(root): shape
        for key, shape in vae_shapes(Sizes(vae=sizes.vae)).items()
        if "quant_conv" not in key
    }
    shapes["encoder.conv_out.weight"] = (2 * LATENT_CHANNELS, sizes.vae, 3, 3)
    shapes["encoder.conv_out.bias"] = (2 * LATENT_CHANNELS,)
    shapes["decoder.conv_in.weight"] = (sizes.vae, LATENT_CHANNELS, 3, 3)
    tensors = {key: drawn(key, shape, seed) for key, shape in shapes.items()}
    let_the_vae_copy_colours(tensors, LATENT_GAIN)
    tensors["encoder.conv_out.bias"][:LATENT_CHANNELS] = LATENT_SHIFT
    tensors["decoder.conv_in.bias"][:8] = -LATENT_SHIFT * tensors["decoder.conv_in.weight"][:8, :, 1, 1].sum(1)
    return tensors


def transformer_shapes(sizes: FluxSizes, kind: str) -> Shapes:
    """Every weight of the transformer."""
    width, patch = sizes.width, 4 * LATENT_CHANNELS
    shapes: Shapes = {}

    def linear(name: str, outer: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner), (outer,)

    linear("img_in", width, patch)
    linear("txt_in", width, sizes.t5)
    if kind == "chroma":
        linear("distilled_guidance_layer.in_proj", sizes.approximator, CHROMA_INPUTS)
        linear("distilled_guidance_layer.out_proj", width, sizes.approximator)
        for i in range(2):
            linear(f"distilled_guidance_layer.layers.{i}.in_layer", sizes.approximator, sizes.approximator)
            linear(f"distilled_guidance_layer.layers.{i}.out_layer", sizes.approximator, sizes.approximator)
            shapes[f"distilled_guidance_layer.norms.{i}.scale"] = (sizes.approximator,)
    else:
        inputs = {"time_in": TIME, "vector_in": sizes.clip} | ({"guidance_in": TIME} if kind == "dev" else {})
        for name, inner in inputs.items():
            linear(f"{name}.in_layer", width, inner)
            linear(f"{name}.out_layer", width, width)
        linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for i in range(sizes.double_blocks):
        shapes |= dict(double_block(f"double_blocks.{i}", sizes, kind != "chroma"))
    for i in range(sizes.single_blocks):
        shapes |= dict(single_block(f"single_blocks.{i}", sizes, kind != "chroma"))
    linear("final_layer.linear", patch, width)
    return shapes


def double_block(root: str, sizes: FluxSizes, modulated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Image and text side by side."""
    width = sizes.width
    for side in ("img", "txt"):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.0": (4 * width, width)}
        layers |= {"mlp.2": (width, 4 * width)} | ({"mod.lin": (6 * width, width)} if modulated else {})
        for name, shape in layers.items():
            yield from ((f"{root}.{side}_{name}.weight", shape), (f"{root}.{side}_{name}.bias", shape[:1]))
        for norm in ("query_norm", "key_norm"):
            yield f"{root}.{side}_attn.norm.{norm}.scale", (width // sizes.heads,)


def single_block(root: str, sizes: FluxSizes, modulated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Image and text in one sequence."""
    width = sizes.width
    layers = {"linear1": (7 * width, width), "linear2": (width, 5 * width)}
    layers |= {"modulation.lin": (3 * width, width)} if modulated else {}
    for name, shape in layers.items():
        yield from ((f"{root}.{name}.weight", shape), (f"{root}.{name}.bias", shape[:1]))
    for norm in ("query_norm", "key_norm"):
        yield f"{root}.norm.{norm}.scale", (width // sizes.heads,)


def t5_shapes(sizes: FluxSizes) -> Shapes:
    """The encoder of T5, whose heads are 64 wide as published."""
    width, inner = sizes.t5, 64 * sizes.t5_heads
    shapes: Shapes = {"shared.weight": (sizes.t5_vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(sizes.t5_layers):
        root = f"encoder.block.{i}.layer"
        shapes |= {f"{root}.0.SelfAttention.{part}.weight": (inner, width) for part in ("q", "k", "v")}
        shapes |= {
            f"{root}.0.SelfAttention.o.weight": (width, inner),
            f"{root}.0.layer_norm.weight": (width,),
            f"{root}.1.DenseReluDense.wi_0.weight": (2 * width, width),
            f"{root}.1.DenseReluDense.wi_1.weight": (2 * width, width),
            f"{root}.1.DenseReluDense.wo.weight": (width, 2 * width),
            f"{root}.1.layer_norm.weight": (width,),
        }
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, sizes.t5_heads)
    return shapes
