"""LoRA and LoCon for Stable Diffusion 1.x, 2.x and XL: which layers they cover, and what --network_args choose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from library.files.unet_names import names_by_level
from networks.core.blocks import (
    BLOCK_ARGS,
    SD_BLOCKS,
    SDXL_BLOCKS,
    BlockLayout,
    BlockSettings,
    read_block_settings,
    read_lr_weights,
    sd_block_index,
    sdxl_block_index,
)
from networks.core.contract import NewNetwork, StoredNetwork, create, create_from_weights
from networks.core.key_names import AdapterShape, adapter_name, clip_path, with_own_names
from networks.core.kinds import CONV_ARGS, AdaptersInFile, Lora, refuse_sizes
from networks.core.network import LoraNetwork
from networks.core.targets import Target
from networks.core.training_args import read_lora_plus

logger = logging.getLogger(__name__)

UNET_PREFIX = "lora_unet"
TEXT_ENCODER_PREFIX = "lora_te"


def _nowhere_else(names: Sequence[str]) -> Mapping[str, str | None]:
    return {}


@dataclass(frozen=True)
class UNetNames:
    """How the modules of a kind of U-Net are called."""

    part: str
    """Which the U-Net has at its top."""
    attention: tuple[str, ...]
    """What a plain LoRA covers: linear layers and 1x1 convolutions of its spatial transformers."""
    convolutional: tuple[str, ...]
    """What comes on top with convolutions: their 3x3 convolutions, and their linear layers and 1x1 convolutions too."""
    blocks: BlockLayout
    block_of: Callable[[str], int]
    in_other_files: Callable[[Sequence[str]], Mapping[str, str | None]] = _nowhere_else
    """Takes the names of the U-Net's weights -> those that some files have in their place."""

    @property
    def all(self) -> tuple[str, ...]:
        """Everything that can be covered."""
        return self.attention + self.convolutional


SD = UNetNames(
    "down_blocks", (".attentions.",), (".resnets.", ".downsamplers.", ".upsamplers."), SD_BLOCKS, sd_block_index
)
SDXL = UNetNames(
    "input_blocks",
    (".proj_in.", ".transformer_blocks.", ".proj_out."),
    (".in_layers.", ".emb_layers.", ".out_layers.", ".skip_connection.", ".op.", ".conv."),
    SDXL_BLOCKS,
    sdxl_block_index,
    names_by_level,
)
TEXT_ENCODER = (".self_attn.", ".mlp.")

_BLOCK_SIZES = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")

# Where siblings stand in a network, whatever their order in the model: it is the order of the keys in published files,
# and it decides which random numbers a layer starts from.
_ORDER = (
    *("input_blocks", "middle_block", "output_blocks"),
    *("down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("proj_in", "transformer_blocks", "proj_out", "attn1", "ff", "attn2", "to_q", "to_k", "to_v", "to_out"),
    *("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection"),
    *("self_attn", "mlp", "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),
)
_PLACE = {word: place for place, word in enumerate(_ORDER)}


def build(request: NewNetwork) -> LoraNetwork:
    """A network with adapters of any kind on the layers that are covered."""
    args = request.read_args(BLOCK_ARGS)
    kind = request.kind(args)
    linear = AdapterShape(request.rank, request.alpha or float(request.rank))
    conv = kind.conv_shape(args, linear)
    names = unet_names(request.unet)
    blocks = read_block_settings(args, names.blocks, linear, conv)

    def shape_of(path: str, layer: nn.Module) -> AdapterShape | None:
        block = names.block_of(path)
        if not kind.covers(path) or blocks.lr_weights is not None and not blocks.lr_weights[block]:
            return None
        convolutional = any(part in f".{path}." for part in names.convolutional)
        covers_convs = conv is not None or blocks.conv is not None
        if convolutional and not covers_convs:
            return None
        if _is_linear(layer):
            return linear if blocks.linear is None else blocks.linear[block]
        return conv if blocks.conv is None else blocks.conv[block]

    unet_targets = []
    for path, parent, attribute, layer in adaptable_layers(request.unet, names.all):
        shape = shape_of(path, layer)
        if shape is not None and shape.rank > 0:
            name = kind.adapter_name(adapter_name(UNET_PREFIX, path))
            unet_targets.append(_unet_target(name, names.block_of(path), parent, attribute, shape, blocks))
    encoder_targets = [
        [
            Target(kind.adapter_name(adapter_name(prefix, clip_path(path))), parent, attribute, linear)
            for path, parent, attribute, _ in found
        ]
        for prefix, found in _encoder_layers(request.text_encoders if kind.of_text_encoders else ())
    ]
    convs = "" if conv is None else f"; convolutions rank {conv.rank}, alpha {conv.alpha:g}"
    logger.info("%s of rank %d, alpha %g%s", kind.name, linear.rank, linear.alpha, convs)
    dropout, plus = request.read_dropout(args), read_lora_plus(args)
    other = other_names(request.unet, names)
    return LoraNetwork(encoder_targets, unet_targets, request.multiplier, dropout, plus, kind, other_names=other)


def build_from_weights(request: StoredNetwork) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network with the adapters of a file, trained as is asked for, and the weights, not yet loaded into it."""
    args = request.read_args(BLOCK_ARGS)
    refuse_sizes(args, (*request.kind.size_args, *CONV_ARGS, *_BLOCK_SIZES))
    kind = request.kind(args)
    names = unet_names(request.unet)
    other = other_names(request.unet, names)
    weights = with_own_names(request.read_weights(), other)
    shapes = AdaptersInFile(weights)
    blocks = BlockSettings(lr_weights=read_lr_weights(args, names.blocks))

    unet_targets = []
    for path, parent, attribute, _ in adaptable_layers(request.unet, names.all):
        found = shapes.find(adapter_name(UNET_PREFIX, path))
        frozen = blocks.lr_weights is not None and not blocks.lr_weights[names.block_of(path)]
        if found is not None and not frozen:
            unet_targets.append(_unet_target(found[0], names.block_of(path), parent, attribute, found[1], blocks))
    encoder_targets = []
    for prefix, layers in _encoder_layers(request.text_encoders):
        targets = []
        for path, parent, attribute, _ in layers:
            found = shapes.find(adapter_name(prefix, clip_path(path)))
            if found is not None:
                targets.append(Target(found[0], parent, attribute, found[1]))
        encoder_targets.append(targets)
    shapes.check_rest(request.file)
    dropout, plus = request.read_dropout(args), read_lora_plus(args)
    network = LoraNetwork(encoder_targets, unet_targets, request.multiplier, dropout, plus, kind, other_names=other)
    return network, weights


create_network = partial(create, Lora, build)
create_network_from_weights = partial(create_from_weights, Lora, build_from_weights)


def unet_names(unet: nn.Module) -> UNetNames:
    """How the modules of this U-Net are called, as its own parts say."""
    parts = dict(unet.named_children())
    return next((names for names in (SDXL, SD) if names.part in parts), SD)


def other_names(unet: nn.Module, names: UNetNames) -> dict[str, str]:
    """Names that some files have for adapters on this U-Net -> the usual ones."""
    weights = [f"{path}.weight" for path, *_ in adaptable_layers(unet, names.all)]
    found = names.in_other_files(weights).items()
    return {_unet_name(theirs): _unet_name(ours) for ours, theirs in found if theirs is not None}


def _unet_name(weight: str) -> str:
    return adapter_name(UNET_PREFIX, weight.removesuffix(".weight"))


def adaptable_layers(model: nn.Module, parts: Sequence[str]) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """(path, parent, attribute, layer) of every linear layer and convolution with one of `parts` in its path."""
    found = [
        (f"{parent_path}.{attribute}".lstrip("."), parent, attribute, layer)
        for parent_path, parent in model.named_modules()
        for attribute, layer in parent.named_children()
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(part in f".{parent_path}.{attribute}." for part in parts)
    ]
    return sorted(found, key=lambda entry: _place(entry[0]))


def _place(path: str) -> tuple[int, ...]:
    """Orders siblings by number, or as `_ORDER` says; what it does not know comes last, in the model's order."""
    return tuple(int(word) if word.isdigit() else _PLACE.get(word, len(_ORDER)) for word in path.split("."))


def _encoder_layers(
    encoders: Sequence[nn.Module],
) -> Iterator[tuple[str, list[tuple[str, nn.Module, str, nn.Module]]]]:
    """The prefix of each text encoder's adapters, and its layers."""
    for number, encoder in enumerate(encoders, start=1):
        prefix = TEXT_ENCODER_PREFIX if len(encoders) == 1 else f"{TEXT_ENCODER_PREFIX}{number}"
        yield prefix, adaptable_layers(encoder, TEXT_ENCODER)


def _unet_target(
    name: str, block: int, parent: nn.Module, attribute: str, shape: AdapterShape, blocks: BlockSettings
) -> Target:
    if blocks.lr_weights is None:
        return Target(name, parent, attribute, shape)
    return Target(name, parent, attribute, shape, f"_block{block}", blocks.lr_weights[block])


def _is_linear(layer: nn.Module) -> bool:
    """Whether `layer` mixes channels only: linear, or a 1x1 convolution."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
