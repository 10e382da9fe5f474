"""Whether the programs that make pictures will find a place for every key of a network's file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.files.weights import describe_keys, open_weights

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter as ComfyUI, A1111 and diffusers tell it from the ends of its keys."""

    name: str
    needed: tuple[tuple[str, ...], ...]
    """Of each of these at least one; a name is known by the first that has all."""
    allowed: tuple[str, ...] = ()
    products: tuple[tuple[str, str, str], ...] = ()
    """(left, right, core): matrices of a product, and what stands between them when a kernel has a core."""


KINDS = (
    Kind(
        "LoRA",
        (("lora_up.weight",), ("lora_down.weight",)),
        ("lora_mid.weight", "alpha", "dora_scale"),
        (("lora_up.weight", "lora_down.weight", "lora_mid.weight"),),
    ),
    Kind(
        "LoHa",
        (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
        ("hada_t1", "hada_t2", "alpha", "dora_scale"),
        (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")),
    ),
    Kind(
        "LoKr",
        (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
        ("lokr_w1_b", "lokr_w2_b", "lokr_t1", "lokr_t2", "alpha", "dora_scale"),
        (("lokr_w1_a", "lokr_w1_b", "lokr_t1"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    ),
    Kind("OFT", (("oft_blocks", "oft_diag"),), ("rescale", "alpha")),
    Kind(
        "GLoRA", (("a1.weight",), ("a2.weight",), ("b1.weight",), ("b2.weight",)), ("bm.weight", "alpha", "dora_scale")
    ),
    Kind("full", (("diff",),), ("diff_b", "alpha")),
    Kind("norm", (("w_norm",),), ("b_norm", "alpha")),
    Kind("IA3", (("weight",), ("on_input",)), ("alpha",)),
)
"""The key ends of published files; LyCORIS writes all of them. Where the layer is, the name before them says."""

OWN_PREFIX = ("oft_", "OFT")
"""Names of layers may begin with this instead of `lora_` in adapters of this kind: A1111 reads both spellings."""


def check_network_file(path: Path, layers: Shapes) -> None:
    """Reopen the header of `path`; ValueError names the first keys that are orphans.

    `layers` is `Architecture.adaptable_layers`.
    """
    with open_weights(path) as file:
        shapes = {key: file.shape(key) for key in file.keys()}
    check_keys(shapes, layers, str(path))


def check_keys(keys: Shapes, layers: Shapes, source: str) -> None:
    """ValueError when a program that knows `layers` would not load one of `keys`; the message begins with `source`."""
    wrong = orphans(keys, layers)
    if wrong:
        first = "\n".join(f"  {key}: {why}" for key, why in list(wrong.items())[:5])
        raise ValueError(
            f"{source}: {len(wrong)} of {len(keys)} keys would not be loaded by ComfyUI, A1111 or diffusers "
            f"({describe_keys(wrong)}):\n{first}\nThis is a mistake of the network module, not of your settings"
        )


def orphans(keys: Shapes, layers: Shapes) -> dict[str, str]:
    """The keys that no program would find a place for, and why."""
    wrong: dict[str, str] = {}
    parts: dict[str, dict[str, Shape]] = {}
    for key, shape in keys.items():
        name, dot, end = key.partition(".")
        if dot:
            parts.setdefault(name, {})[end] = shape
        else:
            wrong[key] = "there is no layer of this name in the model"
    for name, found in parts.items():
        kind = _kind_of(found)
        layer = layers.get(name)
        if layer is None and kind is not None and (name[:4], kind.name) == OWN_PREFIX:
            layer = layers.get(f"lora_{name[4:]}")
        if layer is None:
            wrong |= {f"{name}.{end}": "there is no layer of this name in the model" for end in found}
        else:
            wrong |= {f"{name}.{end}": why for end, why in _wrong_ends(kind, found, layer).items()}
    return wrong


def _kind_of(found: Mapping[str, Shape]) -> Kind | None:
    return next((kind for kind in KINDS if all(any(end in found for end in ends) for ends in kind.needed)), None)


def _wrong_ends(kind: Kind | None, found: Mapping[str, Shape], layer: Shape) -> dict[str, str]:
    if kind is None:
        return dict.fromkeys(found, "its adapter is not complete, or of an unknown kind")
    known = {end for ends in kind.needed for end in ends} | set(kind.allowed)
    wrong = {end: f"a {kind.name} adapter has no such part" for end in found if end not in known}
    for left, right, core in kind.products:
        if left not in found:
            continue
        if right not in found:
            wrong[left] = f"there is no {right} for it"
        # A core of LyCORIS has the rank first on both sides; that of a LoRA stands between out x rank and rank x in.
        elif found[left][0 if core in found and kind.name != "LoRA" else 1] != found[right][0]:
            wrong[left] = f"its rank is not that of {right}"
    if wrong:
        return wrong
    for shape in _full_shapes(kind, found):
        if (shape[0], math.prod(shape[1:])) != (layer[0], math.prod(layer[1:])):
            wrong[next(iter(found))] = f"it makes a change of shape {list(shape)} to a layer of shape {list(layer)}"
    if kind.name == "OFT" and "oft_blocks" in found and math.prod(found["oft_blocks"][-3:-1]) != layer[0]:
        blocks = list(found["oft_blocks"])
        wrong["oft_blocks"] = f"blocks of shape {blocks} do not turn the outputs of a layer of shape {list(layer)}"
    return wrong


def _full_shapes(kind: Kind, found: Mapping[str, Shape]) -> list[Shape]:
    """The shape, out x in, of each change that has to fit the layer; none where it is not worked out.

    A convolution's kernel counts with the inputs, so that linear layers and 1x1 convolutions look alike.
    """
    if kind.name == "LoKr":
        ones = _product(found, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1")
        twos = _product(found, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return [(ones[0] * twos[0], ones[1] * twos[1])]
    if kind.name == "LoRA":
        up, down = found["lora_up.weight"], found["lora_down.weight"]
        kernel = math.prod(found.get("lora_mid.weight", (1, 1))[2:])
        return [(up[0], math.prod(down[1:]) * math.prod(up[2:]) * kernel)]
    if kind.name == "LoHa":
        return [_product(found, "", *product) for product in kind.products]
    return [found["diff"]] if kind.name == "full" else []


def _product(found: Mapping[str, Shape], whole: str, left: str, right: str, core: str) -> tuple[int, int]:
    """The size, out x in, of a matrix that is there as a whole or as a product, with a core between or without."""
    if whole in found:
        return found[whole][0], math.prod(found[whole][1:])
    outputs = found[left][1 if core in found else 0]
    return outputs, math.prod(found[right][1:]) * math.prod(found.get(core, (1, 1))[2:])
