"""Text encoders that are not loaded before something needs them: complete caches never do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.models.architecture import Architecture
from library.train.exit_codes import ExitCode, marked
from library.train.memory import MemoryRoom


class EncodersOnDemand:
    """The text encoders, loaded when something needs them first."""

    def __init__(self, arch: Architecture, room: MemoryRoom) -> None:
        self.arch = arch
        self.room = room
        self._encoders: list[nn.Module] | None = None

    def get(self) -> list[nn.Module]:
        """All of them, in the order of the family."""
        if self._encoders is None:
            with marked(ExitCode.FAILED):
                self._encoders = self.room.load_text_encoders(for_cache=True)
        return self._encoders

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The arrays of the family's text format, [B, ...] each."""
        encoders = self.get()
        tokens = {name: ids.to(self.room.device) for name, ids in self.arch.tokenize(captions).items()}
        return self.arch.encode_text(encoders, tokens)
