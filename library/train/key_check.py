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


KINDS = (
    Kind("LoRA", (("lora_up.weight",), ("lora_down.weight",)), ("lora_mid.weight", "alpha", "dora_scale")),
    Kind(
        "LoHa",
        (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
        ("hada_t1", "hada_t2", "alpha", "dora_scale"),
    ),
    Kind(
        "LoKr",
        (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
        ("lokr_w1_b", "lokr_w2_b", "lokr_t1", "lokr_t2", "alpha", "dora_scale"),
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
        if _layer(name) in layers and dot:
            parts.setdefault(name, {})[end] = shape
        else:
            wrong[key] = "there is no layer of this name in the model"
    for name, found in parts.items():
        wrong |= {f"{name}.{end}": why for end, why in _wrong_ends(found, layers[_layer(name)]).items()}
    return wrong


def _layer(name: str) -> str:
    """The layer's name among all, of which those of OFT have one of their own."""
    return f"lora_{name.removeprefix('oft_')}" if name.startswith("oft_") else name


def _wrong_ends(found: Mapping[str, Shape], layer: Shape) -> dict[str, str]:
    kind = next((kind for kind in KINDS if all(any(end in found for end in ends) for ends in kind.needed)), None)
    if kind is None:
        return dict.fromkeys(found, "its adapter is not complete, or of an unknown kind")
    known = {end for ends in kind.needed for end in ends} | set(kind.allowed)
    wrong = {end: f"a {kind.name} adapter has no such part" for end in found if end not in known}
    if kind.name == "LoRA" and found["lora_up.weight"][1] != found["lora_down.weight"][0]:
        wrong["lora_up.weight"] = "its rank is not that of lora_down"
    shape = _full_shape(kind, found)
    if shape is not None and (shape[0], math.prod(shape[1:])) != (layer[0], math.prod(layer[1:])):
        wrong[next(iter(found))] = f"it makes a change of shape {list(shape)} to a layer of shape {list(layer)}"
    return wrong


def _full_shape(kind: Kind, found: Mapping[str, Shape]) -> Shape | None:
    """The shape, out x in, of the change that the adapter makes; None where it is not worked out.

    A convolution's kernel counts with the inputs, so that linear layers and 1x1 convolutions look alike.
    """
    if kind.name == "LoRA":
        up, down = found["lora_up.weight"], found["lora_down.weight"]
        kernel = math.prod(found.get("lora_mid.weight", (1, 1))[2:])
        return up[0], math.prod(down[1:]) * math.prod(up[2:]) * kernel
    if kind.name == "LoHa" and "hada_t1" not in found:
        return found["hada_w1_a"][0], math.prod(found["hada_w1_b"][1:])
    if kind.name == "LoHa":
        return found["hada_w1_a"][1], found["hada_w1_b"][1] * math.prod(found["hada_t1"][2:])
    if kind.name == "LoKr":
        small, large = _factor(found, "lokr_w1", "lokr_t1"), _factor(found, "lokr_w2", "lokr_t2")
        return small[0] * large[0], small[1] * large[1]
    return found.get("diff") if kind.name == "full" else None


def _factor(found: Mapping[str, Shape], name: str, core: str) -> tuple[int, int]:
    """Rows and columns of one factor of a Kronecker product, which may be a product itself."""
    if name in found:
        return found[name][0], math.prod(found[name][1:])
    first, second = found[f"{name}_a"], found[f"{name}_b"]
    if core in found:
        return first[1], second[1] * math.prod(found[core][2:])
    return first[0], math.prod(second[1:])
