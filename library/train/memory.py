"""Where the weights and activations of a run lie: what the settings ask for, done to its models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from library.flags.run import MemoryFlags
from library.flags.settings import Settings
from library.memory.checkpointing import checkpoint_blocks
from library.models.architecture import Architecture
from library.train.state import Models, Trained


class MemoryRoom:
    """The memory flags of a run; asked while its models are read, and once when everything trained stands in them."""

    def __init__(self, settings: Settings, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._flags = settings[MemoryFlags]
        self._arch = arch
        self.dtype = dtype
        self.device = device

    def load_denoiser(self) -> nn.Module:
        """The denoiser, in the format and place that the settings ask for."""
        return self._arch.load_denoiser(self.dtype, self.device)

    def load_text_encoders(self) -> list[nn.Module]:
        """The text encoders, likewise."""
        return self._arch.load_text_encoders(self.dtype, self.device)

    def attach(self, models: Models, trained: Trained) -> None:
        """Decide what is kept for backward."""
        if self._flags.gradient_checkpointing:
            checkpoint_blocks(self._all_blocks(models, trained))

    def _all_blocks(self, models: Models, trained: Trained) -> Sequence[nn.Module]:
        """The blocks of the denoiser, and of the encoders if these are trained."""
        blocks = self._arch.blocks(models.denoiser)
        for encoder in models.text_encoders if trained.trains_text_encoder else ():
            blocks = blocks + self._arch.encoder_blocks(encoder)
        return blocks
