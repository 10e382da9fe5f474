"""Where each weight of Stable Diffusion lies in a file, in one that is there already or a new one of each layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from library.files.sources import Source
from library.files.whole_model import Value, joined
from library.models.sd.checkpoint import CLIP_PREFIX, OPENCLIP_LAYERS, OPENCLIP_PREFIX
from library.models.sd.layout import published_unet_keys
from library.models.text.clip import openclip_layout
from library.models.vae.sd import LDM_PREFIX, published_vae_layout

Values = Mapping[str, Value]
"""Weights of one part by our names."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a file: which of our weights it holds, one after the other, and in what shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


Slots = dict[str, Slot]
"""By the key in the file."""


def filled(slots: Slots, values: Values, dtype: torch.dtype | None) -> dict[str, Value]:
    """The tensors of a file whose `slots` hold `values`, cast to `dtype` if there is one.

    Every weight has its place; anything else is a mistake of ours.
    """
    placed = {name for slot in slots.values() for name in slot.names}
    assert placed == set(values), f"without a place, or without a value: {sorted(placed ^ set(values))[:5]}"
    return {key: joined([values[name] for name in slot.names], slot.shape, dtype) for key, slot in slots.items()}


def slots_in(sources: Mapping[str, Source]) -> Slots:
    """Where the weights lie in the file that `sources` read."""
    parts: dict[str, list[str]] = {}
    for name, source in sources.items():
        parts.setdefault(source.key, []).append(name)
    slots = {}
    for key, names in parts.items():
        first = sources[names[0]]
        names.sort(key=lambda name: first_row(sources[name]))
        slots[key] = Slot(tuple(names), first.file.shape(key))
    return slots


def first_row(source: Source) -> int:
    """Where in its tensor the rows of `source` begin."""
    return 0 if source.rows is None else source.rows.start or 0


def published_file(parts: Mapping[str, Values], v2: bool, dtype: torch.dtype | None) -> dict[str, Value]:
    """A new file in the published single-file layout, of the `parts` unet, text_encoder and vae."""
    unet, text = parts["unet"], parts["text_encoder"]
    slots = {key: Slot((name,), unet[name].shape) for name, key in published_unet_keys(unet).items()}
    file = filled(slots, unet, dtype) | filled(published_vae_slots(parts["vae"]), parts["vae"], dtype)
    if v2:
        of_text = filled(openclip_slots(text), text, dtype)
        return file | of_text | openclip_rest(of_text)
    names = {f"{CLIP_PREFIX}text_model.{name}": Slot((name,), value.shape) for name, value in text.items()}
    length = text["embeddings.position_embedding.weight"].shape[0]
    positions = Value.of(torch.arange(length)[None])
    return file | filled(names, text, dtype) | {f"{CLIP_PREFIX}text_model.embeddings.position_ids": positions}


def published_vae_slots(vae: Values) -> Slots:
    """The autoencoder in the published single-file layout."""
    layout = published_vae_layout({name: value.shape for name, value in vae.items()})
    return {LDM_PREFIX + key: Slot((name,), shape) for name, (key, shape) in layout.items()}


def openclip_slots(text: Values) -> Slots:
    """The text encoder of 2.x, whose queries, keys and values are one tensor."""
    slots = {}
    for key, names in openclip_layout(text).items():
        shape = text[names[0]].shape
        slots[OPENCLIP_PREFIX + key] = Slot(names, (shape[0] * len(names), *shape[1:]))
    return slots


def openclip_rest(of_text: Values) -> dict[str, Value]:
    """What the published file of 2.x holds beside `of_text` and no program that makes pictures reads.

    The last layer, which here is a copy of the one before, as other converters make it, and the projection.
    """
    norm = of_text[f"{OPENCLIP_PREFIX}ln_final.weight"]
    width = norm.shape[0]
    rest = {
        f"{OPENCLIP_PREFIX}text_projection": Value.of(torch.ones(width, width, dtype=norm.dtype)),
        f"{OPENCLIP_PREFIX}logit_scale": Value.of(torch.tensor(1.0, dtype=norm.dtype)),
    }
    before, last = (f"{OPENCLIP_PREFIX}transformer.resblocks.{OPENCLIP_LAYERS + step}." for step in (-1, 0))
    copied = {last + key.removeprefix(before): value for key, value in of_text.items() if key.startswith(before)}
    return rest | copied


def diffusers_slots(part: str, values: Values) -> Slots:
    """The slots of a new file of one part in a folder of diffusers."""
    prefix = "text_model." if part == "text_encoder" else ""
    slots = {}
    for name, value in values.items():
        is_convolution = part == "vae" and ".attentions." in name and len(value.shape) == 4
        slots[prefix + name] = Slot((name,), value.shape[:2] if is_convolution else value.shape)
    return slots
