"""A layer that is to be adapted, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from networks.core.key_names import AdapterShape


@dataclass(frozen=True)
class Target:
    """A layer to be adapted."""

    name: str
    """What its adapter is called, such as `lora_unet_mid_block_attentions_0_proj_in`."""
    parent: nn.Module
    attribute: str
    shape: AdapterShape
    group: str = ""
    """Layers with a learning rate of their own share a parameter group, whose name ends in this."""
    rate: float = 1.0
    """Share of the learning rate of its part of the model."""
    own_rate: float | None = None
    """Learning rate that takes the place of that."""
    parts: tuple[int, ...] = ()
    """Rows of each of the layers that this one stands for, which get a pair each; empty for one pair."""

    @property
    def layer(self) -> Any:
        """The linear layer or convolution, or what stands in its place."""
        return getattr(self.parent, self.attribute)
