"""LoRA files on the models that make pictures: standing in their layers, or merged into their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TEXT_ENCODER_PREFIX = "lora_te"
"""What the keys of all text encoders begin with."""


@dataclass(frozen=True)
class LoraWeights:
    """A file of adapters and how strongly it counts."""

    path: str
    multiplier: float
    weights: Mapping[str, Tensor]
    module: Any
    """The network module that reads it, such as `networks.lora_flux`."""

    def part(self, of_text_encoders: bool) -> dict[str, Tensor]:
        """Its weights for the text encoders, or for the denoiser."""
        return {
            key: value for key, value in self.weights.items() if key.startswith(TEXT_ENCODER_PREFIX) == of_text_encoders
        }


@dataclass
class Loras:
    """The files, in order; with `merge` they become part of the weights and cannot be changed any more."""

    files: Sequence[LoraWeights]
    merge: bool = False
    _networks: list[tuple[int, Any]] = field(default_factory=list)

    def on_text_encoders(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        """Put what the files hold for text encoders on them; with a warning, leave out what is for other encoders."""
        for index, file in enumerate(self.files):
            try:
                self._put(index, file.part(of_text_encoders=True), list(encoders), nn.Module(), device)
            except ValueError as error:
                if not file.part(of_text_encoders=False):
                    raise
                logger.warning("%s: what it holds for text encoders is left out: %s", file.path, error)

    def on_denoiser(self, denoiser: nn.Module, device: torch.device) -> None:
        """Put what the files hold for the denoiser on it."""
        for index, file in enumerate(self.files):
            self._put(index, file.part(of_text_encoders=False), [], denoiser, device)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """One for each file; ValueError when there are more or fewer, or when the files are merged."""
        if self.merge:
            raise ValueError("merged LoRA files keep the multiplier they were merged with")
        if len(multipliers) != len(self.files):
            raise ValueError(f"{len(multipliers)} multipliers for {len(self.files)} LoRA files")
        for index, network in self._networks:
            network.set_multiplier(multipliers[index])

    def _put(
        self,
        index: int,
        weights: dict[str, Tensor],
        encoders: list[nn.Module],
        denoiser: nn.Module,
        device: torch.device,
    ) -> None:
        if not weights:
            return
        file = self.files[index]
        network, _ = file.module.create_network_from_weights(
            file.multiplier, file.path, None, encoders, denoiser, weights_sd=weights, for_inference=True
        )
        if self.merge:
            network.merge_to(encoders, denoiser, weights, None, device)
            return
        network.apply_to(encoders, denoiser, bool(encoders), not encoders)
        network.load_state_dict(weights, strict=False)
        network.to(device, _dtype_of([*encoders, denoiser])).eval().requires_grad_(False)
        self._networks.append((index, network))


def _dtype_of(models: Sequence[nn.Module]) -> torch.dtype:
    """What the weights of `models` are calculated in; those in float8 are not calculated in."""
    dtypes = (parameter.dtype for model in models for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype.itemsize > 1), torch.float32)
