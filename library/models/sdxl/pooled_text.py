"""The second text encoder of Stable Diffusion XL, which also gives one vector for the whole text."""

from __future__ import annotations

from torch import Tensor, nn

from library.models.text.clip import TextEncoder


class PooledTextEncoder(nn.Module):
    """OpenCLIP bigG."""

    def __init__(self, text_model: TextEncoder, projection: Tensor, end_token: int) -> None:
        """`projection` is [D, P] as OpenCLIP stores it: it multiplies from the right."""
        super().__init__()
        self.text_model = text_model
        self.text_projection = nn.Parameter(projection)
        self.end_token = end_token

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] -> the states before the last layer [B, L, D], without a norm, and the pooled text [B, P].

        Pooled is the last state at the first end mark, through norm and projection.
        """
        before_last, last = self.text_model.states(input_ids, 2, 1)
        place = (input_ids == self.end_token).int().argmax(dim=-1)[:, None, None].expand(-1, 1, last.shape[-1])
        at_end = self.text_model.final_layer_norm(last).gather(1, place).squeeze(1)
        return before_last, at_end @ self.text_projection.to(at_end.dtype)
