"""Where each token lies, as angles by which queries and keys are turned."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0
TEXT_TOKENS = 512
"""Tables have rows for this much text at least, so that captions of all lengths share one."""

MOST_TABLES = 64
"""More than a training has buckets; beyond, the oldest goes. One for 1024x1024 pixels takes 2.4 MB."""


class RopeTables:
    """Cosines and sines for pictures of any size, made once for each size and kept on the device.

    A head of D channels turns D/8 of them by an index that is always 0, and 7D/16 each by the row and the column of
    the patch (16, 56 and 56 of 128 in the published models). Text lies at 0 in all three and is not turned.
    """

    def __init__(self, head_dim: int) -> None:
        if head_dim % 32:
            raise ValueError(f"heads of {head_dim} channels cannot share them among three axes: not a multiple of 32")
        self.axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, size: tuple[int, int], text_tokens: int, device: torch.device) -> Tensor:
        """Cosines and sines for `size` rows and columns of patches, then `text_tokens` of text.

        float32 [L + T, 1, D / 2, 2], for queries and keys [B, L + T, H, D].
        """
        key = (*size, device)
        needed = size[0] * size[1] + text_tokens
        table = self._tables.get(key)
        if table is None or len(table) < needed:
            with torch.inference_mode(False):  # a table of a picture may serve a training step later
                table = self._table(size, max(text_tokens, TEXT_TOKENS)).to(device)
            if len(self._tables) >= MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = table
        return table[:needed]

    def _table(self, size: tuple[int, int], text_tokens: int) -> Tensor:
        """In float64 on the CPU, since some devices have none."""
        rows, columns = size
        places = (torch.zeros(rows, columns), torch.arange(rows)[:, None], torch.arange(columns)[None])
        angles = [
            place.expand(rows, columns).flatten().double()[:, None]
            * THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for place, dim in zip(places, self.axes)
        ]
        image = torch.cat(angles, dim=1)  # [L, D / 2]
        whole = torch.cat([image, image.new_zeros(text_tokens, image.shape[1])])
        return torch.stack([whole.cos(), whole.sin()], dim=-1).float()[:, None]
