"""Encoded prompts -> the latents of one picture, with any model family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.models.architecture import Architecture, ImageRequest


def picture_latents(
    arch: Architecture, denoiser: nn.Module, text: Mapping[str, Tensor], request: ImageRequest, device: torch.device
) -> Tensor:
    """[1, C, h, w] as `decode_latents` takes them, for a complete `request`.

    `text` has two rows, of the prompt and of the negative prompt. A model that is told sizes hears that the picture is
    as large as it will be, and not cut.
    """
    assert request.height is not None and request.width is not None, "a complete request"
    size = [request.height, request.width]
    sizes = torch.tensor([[*size, 0, 0, *size]] * 2, dtype=torch.float32, device=device)
    both = arch.condition(dict(text), sizes)
    return arch.sample(denoiser, both.rows([0]), both.rows([1]), request)
