"""Eight-bit pictures, and the numbers that their levels stand for.

The numbers are looked up where they are used: between processes and on the way to a GPU they are four times as large.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scale:
    """The number that each of the 256 levels of a channel stands for."""

    values: np.ndarray
    """[256] float32"""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def numbers(self, levels: Tensor) -> Tensor:
        """uint8 [..., W] -> contiguous float32 of the same shape on the same device; numbers stay as they are.

        Every device looks them up: the formula's division would round otherwise on a GPU.
        """
        if levels.dtype != torch.uint8:
            return levels
        if levels.device.type == "cpu":
            rows = levels.reshape(-1, levels.shape[-1]).numpy()
            return torch.from_numpy(cv2.LUT(rows, self.values)).reshape(levels.shape)
        return looked_up(levels, self._on(levels.device))

    def _on(self, device: torch.device) -> Tensor:
        """The values on `device`, copied once."""
        if device not in self._copies:
            self._copies[device] = torch.from_numpy(self.values).to(device)
        return self._copies[device]


def looked_up(levels: Tensor, values: Tensor) -> Tensor:
    """uint8 of any shape, values [256] -> values of the same shape, by operations that every device has."""
    return values.index_select(0, levels.flatten().int()).reshape(levels.shape)


COLOUR = Scale(((np.arange(256, dtype=np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)).astype(np.float32))
"""-1 to 1: what a denoiser's VAE is shown."""
SHARE = Scale(np.arange(256, dtype=np.float32) / np.float32(255))
"""0 to 1: how much a pixel counts."""
