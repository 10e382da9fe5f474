"""The VAE, loaded when the first image needs it, so that a run with complete caches never does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.models.architecture import Architecture
from library.train.exit_codes import ExitCode, marked


class VaeOnDemand:
    """Encodes images for the cache; `get` loads the VAE once."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self._vae: nn.Module | None = None

    def get(self) -> nn.Module:
        """The VAE on the device of the run."""
        if self._vae is None:
            with marked(ExitCode.FAILED):  # it may be loaded while images are read
                self._vae = self.arch.load_vae(self.dtype, self.device)
        return self._vae

    @torch.no_grad()
    def encode(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]; row i depends on its pixels and `seeds[i]` alone."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.arch.encode_image(self.get(), pixels.to(self.device, self.dtype), generators)
