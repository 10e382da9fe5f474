"""LoRA for FLUX.1 and Chroma: which layers it covers, and what --network_args choose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from networks.core.contract import NetworkRequest, NewNetwork, StoredNetwork, create, create_from_weights
from networks.core.key_names import AdapterShape, adapter_name, clip_path
from networks.core.kinds import CONV_ARGS, AdaptersInFile, Kind, Lora, refuse_sizes
from networks.core.network import LoraNetwork
from networks.core.options import NetworkArgs
from networks.core.patterns import REG_ARGS, NamePatterns, read_indices, read_list, read_patterns
from networks.core.targets import Target
from networks.core.training_args import GGPO_ARGS, read_lora_plus

logger = logging.getLogger(__name__)

PREFIX = "lora_unet"
ENCODERS = (("lora_te1", (".self_attn.", ".mlp.")), ("lora_te3", (".SelfAttention.", ".DenseReluDense.")))
"""CLIP-L and T5-XXL: how the names of their adapters begin, and what is covered of each. There is no second one."""
T5 = 1

BLOCK_LISTS = ("double_blocks", "single_blocks")
IN_LAYERS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""The layers before the blocks, in the order of `in_dims`."""
SIZES: dict[str, tuple[str, ...]] = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "img_mod_dim": ("img_mod",),
    "txt_mod_dim": ("txt_mod",),
    "single_dim": ("single_blocks", "linear"),
    "single_mod_dim": ("modulation",),
}
"""Argument -> what the name of a layer must contain for the rank to hold; the first that fits does."""
FUSED = {"img_attn.qkv": 3, "txt_attn.qkv": 3, "linear1": 4}
"""Ends of the paths of layers that are several in one: q, k, v, and in single blocks the first layer of the MLP."""

_INDICES = {"double_blocks": "train_double_block_indices", "single_blocks": "train_single_block_indices"}
_TRAIN_BLOCKS = {"all": BLOCK_LISTS, "double": BLOCK_LISTS[:1], "single": BLOCK_LISTS[1:]}
_CONV_SWITCHES = ("use_tucker", "enable_conv")
_SIZE_ARGS = (*SIZES, "in_dims", "train_blocks", *_INDICES.values(), REG_ARGS[0], "train_t5xxl", *CONV_ARGS)
_FLUX_ARGS = (*(key for key in _SIZE_ARGS if key not in CONV_ARGS), REG_ARGS[1], "verbose")


class FluxLora(Lora):
    """LoRA with what is known of FLUX.1 only."""

    args = (*Lora.args, "split_qkv", *GGPO_ARGS)


class Layer(NamedTuple):
    """A linear layer of the transformer or a text encoder."""

    path: str
    parent: nn.Module
    attribute: str
    name: str
    """What its adapter is called."""


def build(request: NewNetwork) -> LoraNetwork:
    """A network with adapters of any kind on the layers that are covered."""
    args = request.read_args(_FLUX_ARGS)
    kind = request.kind(args)
    for key in (*CONV_ARGS, *_CONV_SWITCHES):
        if key in args:
            logger.warning("--network_args %s has no effect: FLUX.1 and Chroma have no convolutions", key)
    ranks = _Ranks(args, request.rank, request.unet)

    layers = [*block_layers(request.unet), *(in_layers(request.unet) if "in_dims" in args else ())]
    found = [(layer, ranks.of(layer)) for layer in layers if kind.covers(layer.path)]
    trains_t5 = args.boolean("train_t5xxl") or False
    given = request.text_encoders if kind.of_text_encoders else ()
    encoders = [
        [(layer, ranks.of_encoder(layer)) for layer in (() if number == T5 and not trains_t5 else each)]
        for number, each in enumerate(encoder_layers(given))
    ]
    ranks.warn_of_unused([layer.name for layer, _ in [*found, *(pair for part in encoders for pair in part)]])

    def shaped(part: Sequence[tuple[Layer, int]]) -> list[tuple[Layer, AdapterShape]]:
        return [
            (layer._replace(name=kind.adapter_name(layer.name)), AdapterShape(rank, request.alpha or float(rank)))
            for layer, rank in part
            if rank > 0
        ]

    return _network(args, kind, [shaped(part) for part in encoders], shaped(found), request)


def build_from_weights(request: StoredNetwork) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network with the adapters of a file, trained as is asked for, and the weights, not yet loaded into it.

    Any linear layer of the transformer that the file names is covered, T5-XXL if it has keys for it.
    """
    args = request.read_args(_FLUX_ARGS)
    refuse_sizes(args, (*request.kind.size_args, *_SIZE_ARGS))
    kind = request.kind(args)
    weights = request.read_weights()
    shapes = AdaptersInFile(weights)

    def shaped(part: Sequence[Layer]) -> list[tuple[Layer, AdapterShape]]:
        named = [(layer, shapes.find(layer.name)) for layer in part]
        return [(layer._replace(name=found[0]), found[1]) for layer, found in named if found is not None]

    layers = shaped(linear_layers(request.unet, PREFIX))
    encoders = [shaped(part) for part in encoder_layers(request.text_encoders)]
    shapes.check_rest(request.file)
    return _network(args, kind, encoders, layers, request), weights


create_network = partial(create, FluxLora, build)
create_network_from_weights = partial(create_from_weights, FluxLora, build_from_weights)


def block_layers(model: nn.Module) -> list[Layer]:
    """The linear layers of all blocks."""
    return [
        layer for layer in linear_layers(model, PREFIX) if layer.path.startswith(tuple(f"{b}." for b in BLOCK_LISTS))
    ]


def in_layers(model: nn.Module) -> list[Layer]:
    """The linear layers before the blocks."""
    layers = linear_layers(model, PREFIX)
    return [layer for part in IN_LAYERS for layer in layers if layer.path.partition(".")[0] == part]


def encoder_layers(encoders: Sequence[nn.Module]) -> Iterator[list[Layer]]:
    """The linear layers of attention and feed-forward of CLIP-L, and of T5-XXL if it is there."""
    if len(encoders) > len(ENCODERS):
        raise ValueError(
            f"networks.lora_flux is for CLIP-L and T5-XXL, and the model has {len(encoders)} text encoders"
        )
    for encoder, (prefix, parts) in zip(encoders, ENCODERS, strict=False):
        layers = linear_layers(encoder, prefix)
        covered = [layer for layer in layers if any(part in f".{layer.path}" for part in parts)]
        yield [
            layer._replace(name=adapter_name(prefix, clip_path(layer.path))) if prefix == ENCODERS[0][0] else layer
            for layer in covered
        ]


def linear_layers(model: nn.Module, prefix: str) -> list[Layer]:
    """Every linear layer of `model`, in its own order."""
    found = []
    for parent_path, parent in model.named_modules():
        for attribute, layer in parent.named_children():
            path = f"{parent_path}.{attribute}".lstrip(".")
            if isinstance(layer, nn.Linear):
                found.append(Layer(path, parent, attribute, adapter_name(prefix, path)))
    return found


class _Ranks:
    """Which rank each layer gets; 0 is none."""

    def __init__(self, args: NetworkArgs, rank: int, model: nn.Module) -> None:
        self.rank = rank
        self.by_name = read_patterns(args, REG_ARGS[0], whole=True)
        self.sizes = {key: args.integer(key, low=0) for key in SIZES if key in args}
        self.before = read_list(args, "in_dims", len(IN_LAYERS))
        named = args.text("train_blocks") or "all"
        if named not in _TRAIN_BLOCKS:
            raise ValueError(f"--network_args train_blocks={named}: expected one of {', '.join(_TRAIN_BLOCKS)}")
        self.chosen = {
            blocks: read_indices(args, key, len(getattr(model, blocks, ())))
            if blocks in _TRAIN_BLOCKS[named]
            else set()
            for blocks, key in _INDICES.items()
        }

    def of(self, layer: Layer) -> int:
        """The rank of a layer of the transformer."""
        found = self.by_name.find(layer.name)
        if found is not None:
            return int(found[1])
        blocks, number, *_ = [*layer.path.split("."), ""]
        if blocks in IN_LAYERS:
            return 0 if self.before is None else self.before[IN_LAYERS.index(blocks)]
        if int(number) not in self.chosen[blocks]:
            return 0
        size = next((self.sizes[key] for key in self.sizes if _fits(key, layer.name)), None)
        return self.rank if size is None else size

    def of_encoder(self, layer: Layer) -> int:
        """The rank of a layer of a text encoder."""
        found = self.by_name.find(layer.name)
        return self.rank if found is None else int(found[1])

    def warn_of_unused(self, names: Sequence[str]) -> None:
        """Say which arguments concern no layer of this model."""
        self.by_name.warn_of_unused(names)
        for key, size in self.sizes.items():
            if not any(_fits(key, name) for name in names):
                logger.warning("--network_args %s=%d has no effect: this model has no such layers", key, size)
        for part, size in zip(IN_LAYERS, self.before or (), strict=False):
            if size and not any(name.startswith(f"{PREFIX}_{part}") for name in names):
                logger.warning("--network_args in_dims: %d for %s has no effect: this model has none", size, part)


def _fits(key: str, name: str) -> bool:
    """Whether `name` is that of a layer whose rank `key` says, unless a key before it does."""
    first = next((kind for kind, words in SIZES.items() if all(word in name for word in words)), None)
    return first == key and name.startswith(PREFIX)


def _network(
    args: NetworkArgs,
    kind: Kind,
    encoders: Sequence[Sequence[tuple[Layer, AdapterShape]]],
    layers: Sequence[tuple[Layer, AdapterShape]],
    request: NetworkRequest,
) -> LoraNetwork:
    """The network on these layers, trained as `args` say."""
    rates = read_patterns(args, REG_ARGS[1], whole=False)
    splits = args.boolean("split_qkv") or False
    rates.warn_of_unused([layer.name for part in (layers, *encoders) for layer, _ in part])

    def target(layer: Layer, shape: AdapterShape) -> Target:
        parts = _parts(layer) if splits else ()
        if parts and shape.tensors is not None:
            if shape.rank % len(parts):
                raise ValueError(f"--network_args split_qkv: {layer.name} has rank {shape.rank} in the file, which is "
                                 f"not that of {len(parts)} equal parts; it was not trained so")  # fmt: skip
            shape = AdapterShape(shape.rank // len(parts), shape.alpha / len(parts), shape.tensors)
        group, own_rate = _own_rate(rates, layer.name)
        return Target(layer.name, layer.parent, layer.attribute, shape, group, own_rate=own_rate, parts=parts)

    encoder_targets = [[target(*pair) for pair in part] for part in encoders]
    targets = [target(*pair) for pair in layers]
    if args.boolean("verbose"):
        for each in (each for part in (*encoder_targets, targets) for each in part):
            logger.info("%s: rank %d, alpha %g%s", each.name, each.shape.rank, each.shape.alpha,
                        f", {len(each.parts)} parts" if each.parts else "")  # fmt: skip
    return LoraNetwork(
        encoder_targets,
        targets,
        request.multiplier,
        request.read_dropout(args),
        read_lora_plus(args),
        kind,
        joint_encoders=False,
    )


def _own_rate(rates: NamePatterns, name: str) -> tuple[str, float | None]:
    """The parameter group and the learning rate of a layer that has its own."""
    found = rates.find(name)
    return ("", None) if found is None else (f" reg_lr_{found[0]}", found[1])


def _parts(layer: Layer) -> tuple[int, ...]:
    """The rows of q, k, v and the MLP in a layer that makes them all; () for any other."""
    count = next((count for end, count in FUSED.items() if layer.path.endswith(end)), 0)
    if not count or layer.path.partition(".")[0] not in BLOCK_LISTS:
        return ()
    linear = getattr(layer.parent, layer.attribute)
    width = linear.out_features // 3 if count == 3 else linear.in_features
    return (width,) * 3 + ((linear.out_features - 3 * width,) if count == 4 else ())
