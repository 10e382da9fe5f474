"""What one training step of FLUX.1 and Chroma asks of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data.items import Batch
from library.diffusion.process import Draws
from library.models.flux.architecture import Flux
from library.train.state import Models
from library.train.step import step_loss
from step_counts import OperationCounter
from tests.library.models.flux import small

CPU = torch.device("cpu")
CAPTIONS = ["a red house on the hill", "cat"]


class Untrained:
    trains_text_encoder = False

    @contextmanager
    def off(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("shape", [small.DEV, small.SCHNELL, small.CHROMA], ids=["dev", "schnell", "chroma"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached text", "live text"])
def test_no_step_waits_for_a_number_from_the_device(tmp_path: Path, shape: Any, cached: bool) -> None:
    arch = Flux(small.settings(tmp_path, shape, apply_t5_attn_mask=True))
    encoders, denoiser = arch.load_text_encoders(torch.float32, CPU), arch.load_denoiser(torch.float32, CPU)
    denoiser.get_parameter("double_blocks.0.img_attn.qkv.weight").requires_grad_()
    text = arch.encode_text(encoders, arch.tokenize(CAPTIONS))
    batch = Batch(CAPTIONS, torch.ones(2), latents=torch.randn(2, 16, 4, 6))
    if cached:
        batch.text, batch.text_lengths = text, (7, 2)
    models = Models([] if cached else encoders, denoiser)
    with OperationCounter() as counts:
        loss = step_loss(batch, arch, models, Untrained(), Draws.seeded(0))
        loss.backward()
    assert loss.isfinite() and counts.scalar_reads == 0


def test_masked_steps_of_cached_and_of_live_text_are_equal(tmp_path: Path) -> None:
    arch = Flux(small.settings(tmp_path, small.CHROMA))
    encoders, denoiser = arch.load_text_encoders(torch.float32, CPU), arch.load_denoiser(torch.float32, CPU)
    text = arch.encode_text(encoders, arch.tokenize(CAPTIONS))
    latents = torch.randn(2, 16, 4, 6)
    live = Batch(CAPTIONS, torch.ones(2), latents=latents)
    cached = Batch(CAPTIONS, torch.ones(2), latents=latents, text=text, text_lengths=(7, 2))
    losses = [
        step_loss(live, arch, Models(encoders, denoiser), Untrained(), Draws.seeded(0)),
        step_loss(cached, arch, Models([], denoiser), Untrained(), Draws.seeded(0)),
    ]
    assert torch.equal(*losses)
