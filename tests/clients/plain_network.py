"""A network of another project that knows no weight norms: as networks.lora, with that left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from networks import lora


class Plain(nn.Module):
    """Hands everything on but `apply_max_norm_regularization`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.inner = network

    def apply_to(self, *words: Any) -> None:
        """As the real one's."""
        self.inner.apply_to(*words)


def create_network(*words: Any, **more: Any) -> Plain:
    """As networks.lora's."""
    return Plain(lora.create_network(*words, **more))
