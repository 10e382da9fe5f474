"""Why a loss is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.data.items import Batch
from library.flags.settings import Settings
from library.train.diagnosis import likely_causes
from library.train.state import Models


class Encoder:
    """A family whose VAE answers with what it is shown, and fails at numbers outside -1 to 1."""

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.bfloat16
        return pixels.where(pixels.abs() <= 1, torch.nan)


def causes(pixels: Tensor) -> list[str]:
    models = Models([], nn.Identity(), nn.Linear(1, 1, dtype=torch.bfloat16))
    batch = Batch(["a", "b"], torch.ones(2), pixels=pixels, paths=["pictures/a.png", "pictures/b.png"])
    return likely_causes(Settings.of(), Encoder(), models, batch, [1e-4], True)  # type: ignore[arg-type]


def test_the_vae_is_asked_with_the_numbers_of_eight_bit_pictures() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    assert causes(levels) == ["nothing is known against images and settings: try a lower --learning_rate"]


def test_the_picture_that_the_vae_fails_at_is_named() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 0, 0, 0] = 2
    assert causes(pixels) == ["the VAE's answer to b.png is not finite: use --no_half_vae, or another --vae"]
