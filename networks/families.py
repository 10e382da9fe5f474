"""Which network module knows the layers of a model: told by the paths in the model itself.

The modules `networks.loha`, `networks.lokr` and so on put a kind of adapter on the layers of any of these families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from networks import lora, lora_flux
from networks.core.kinds import Kind
from networks.core.network import LoraNetwork

FAMILIES: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (lora_flux, ("double_blocks.", "single_blocks.", "encoder.block.")),
    (lora, ("down_blocks.", "input_blocks.", "self_attn.", "text_model.")),
)
"""A module with `build` and `build_from_weights`, and how paths begin, or go on after a dot, in a model of its."""


def create(
    kind: type[Kind],
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoraNetwork:
    """A network of this kind for the given models; `kwargs` are the --network_args, as text.

    Raises:
        ValueError: the model is of no known family, or `kwargs` hold an unknown key or a bad value.
    """
    family = family_of(unet, text_encoder)
    network: LoraNetwork = family.build(
        kind, multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
    )
    return network


def create_from_weights(
    kind: type[Kind],
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network of the shape that `file` or `weights_sd` has, and the weights, not yet loaded into it.

    Raises:
        ValueError: as for `create`, or no key of the weights belongs to this model.
    """
    family = family_of(unet, text_encoder)
    made: tuple[LoraNetwork, Mapping[str, Tensor]] = family.build_from_weights(
        kind, multiplier, file, text_encoder, unet, weights_sd, for_inference, neuron_dropout, kwargs
    )
    return made


def family_of(unet: nn.Module, text_encoder: nn.Module | Sequence[nn.Module]) -> ModuleType:
    """The network module that knows the layers of these models; the denoiser decides if it has any.

    Raises:
        ValueError: none does.
    """
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)
    for models in ([unet], encoders):
        paths = [f".{name}." for model in models for name, _ in model.named_modules()]
        for family, parts in FAMILIES:
            if any(f".{part}" in path for part in parts for path in paths):
                return family
    known = ", ".join(family.__name__ for family, _ in FAMILIES)
    raise ValueError(f"{type(unet).__name__} has no layers that one of {known} knows: no network for such a model")
