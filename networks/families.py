"""Which network module knows the layers of a model: told by the paths in the model itself.

The modules `networks.loha`, `networks.lokr` and so on put a kind of adapter on the layers of any of these families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

from torch import Tensor, nn

from networks import lora, lora_flux
from networks.core.contract import NewNetwork, StoredNetwork
from networks.core.network import LoraNetwork

FAMILIES: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (lora_flux, ("double_blocks.", "single_blocks.", "encoder.block.")),
    (lora, ("down_blocks.", "input_blocks.", "self_attn.", "text_model.")),
)
"""A module with `build` and `build_from_weights`, and how paths begin, or go on after a dot, in a model of its."""


def build(request: NewNetwork) -> LoraNetwork:
    """A new network for models of any known family.

    Raises:
        ValueError: the models are of no known family, or the --network_args hold an unknown key or a bad value.
    """
    family = family_of(request.unet, request.text_encoders)
    network: LoraNetwork = family.build(request)
    return network


def build_from_weights(request: StoredNetwork) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network of the shape that a file has, for models of any known family, and the weights, not yet loaded.

    Raises:
        ValueError: as for `build`, or no key of the weights belongs to these models.
    """
    family = family_of(request.unet, request.text_encoders)
    made: tuple[LoraNetwork, Mapping[str, Tensor]] = family.build_from_weights(request)
    return made


def family_of(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> ModuleType:
    """The network module that knows the layers of the models; the denoiser decides if it has any.

    Raises:
        ValueError: none does.
    """
    for models in ([unet], text_encoders):
        paths = [f".{name}." for model in models for name, _ in model.named_modules()]
        for family, parts in FAMILIES:
            if any(f".{part}" in path for part in parts for path in paths):
                return family
    known = ", ".join(family.__name__ for family, _ in FAMILIES)
    raise ValueError(f"{type(unet).__name__} has no layers that one of {known} knows: no network for such a model")
