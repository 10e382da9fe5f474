"""One batch -> one loss."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from library.data.items import Batch
from library.diffusion.ddpm import DDPM
from library.diffusion.process import Draws
from library.files.formats import TextFormat
from library.flags.objective import LossFlags, NoiseFlags
from library.models.architecture import Condition
from library.train.state import Models
from library.train.step import step_loss, step_seed


class ToyFamily:
    """Predicts `bias`, scaled latents are twice the cached ones, one text encoder counts letters."""

    text = TextFormat(suffix="", arrays=("context",))

    def __init__(self, **loss):
        self.process = DDPM(NoiseFlags(), LossFlags(**loss), v_parameterization=False)

    def tokenize(self, captions):
        return {"length": torch.tensor([[float(len(caption))] for caption in captions])}

    def encode_text(self, encoders, tokens):
        return {"context": encoders[0](tokens["length"])}

    def encode_image(self, vae, pixels, generator):
        return vae(pixels)

    def scale_latents(self, latents):
        return 2 * latents

    def condition(self, text, sizes=None, lengths=None):
        return Condition(text)

    def predict(self, denoiser, x, t, cond):
        return denoiser.bias + cond.text["context"].view(-1, 1, 1, 1) + 0 * x


class ToyTrained:
    trains_text_encoder = False

    def __init__(self, denoiser):
        self.denoiser = denoiser

    @contextmanager
    def off(self):
        kept, self.denoiser.bias.data = self.denoiser.bias.data, torch.tensor(7.0)
        yield
        self.denoiser.bias.data = kept


@pytest.fixture
def models():
    denoiser = nn.Module()
    denoiser.bias = nn.Parameter(torch.tensor(0.5))
    encoder = nn.Linear(1, 1, bias=False)
    nn.init.constant_(encoder.weight, 0.25)
    vae = nn.Conv2d(3, 4, 8, 8)
    return Models([encoder], denoiser, vae)


def expected_noise(shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_weighted_mean_square_of_what_is_missing(models):
    batch = Batch(["cat", "a"], torch.tensor([1.0, 0.5]), latents=torch.zeros(2, 4, 2, 3))
    loss = step_loss(batch, ToyFamily(), models, ToyTrained(models.denoiser), Draws.seeded(3))
    noise = expected_noise((2, 4, 2, 3))
    answers = torch.tensor([0.5 + 0.75, 0.5 + 0.25]).view(2, 1, 1, 1)
    rows = (answers - noise).square().mean(dim=(1, 2, 3)) * torch.tensor([1.0, 0.5])
    assert loss.item() == pytest.approx(rows.mean().item(), rel=1e-6)


def test_a_row_that_keeps_the_prior_is_compared_with_the_untrained_answer(models):
    batch = Batch(["", ""], torch.ones(2), latents=torch.zeros(2, 4, 2, 3), keep_prior=(1,))
    loss = step_loss(batch, ToyFamily(), models, ToyTrained(models.denoiser), Draws.seeded(3))
    noise = expected_noise((2, 4, 2, 3))[0]
    rows = torch.stack([(0.5 - noise).square().mean(), torch.tensor((0.5 - 7.0) ** 2)])
    assert loss.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    loss.backward()
    assert models.denoiser.bias.grad.item() == pytest.approx((0.5 - noise).mean().item() + (0.5 - 7.0), rel=1e-5)


def test_the_base_model_is_asked_with_every_batch_where_the_ranks_keep_in_step(models):
    asked = []

    class Counted(ToyTrained):
        @contextmanager
        def off(self):
            with super().off():
                asked.append(True)
                yield

    batch = Batch(["", ""], torch.ones(2), latents=torch.zeros(2, 4, 2, 3))
    alone = step_loss(batch, ToyFamily(), models, Counted(models.denoiser), Draws.seeded(3))
    assert not asked
    models.asks_base = True
    in_step = step_loss(batch, ToyFamily(), models, Counted(models.denoiser), Draws.seeded(3))
    assert asked == [True] and torch.equal(alone, in_step)


def test_a_mask_takes_its_pixels_out_of_the_loss(models):
    mask = torch.ones(1, 1, 16, 24)
    mask[..., 12:] = 0  # the right half of the picture
    batch = Batch([""], torch.ones(1), latents=torch.zeros(1, 4, 2, 3), masks=mask)
    loss = step_loss(batch, ToyFamily(), models, ToyTrained(models.denoiser), Draws.seeded(3))
    weights = torch.tensor([1.0, 0.5, 0.0])
    noise = expected_noise((1, 4, 2, 3))
    assert loss.item() == pytest.approx(((0.5 - noise).square() * weights).mean().item(), rel=1e-6)


def test_pixels_are_encoded_when_no_latents_are_cached(models):
    pixels = torch.rand(1, 3, 16, 24)
    batch = Batch([""], torch.ones(1), pixels=pixels)
    by_pixels = step_loss(batch, ToyFamily(), models, ToyTrained(models.denoiser), Draws.seeded(3))
    with torch.no_grad():
        cached = Batch([""], torch.ones(1), latents=models.vae(pixels))
    by_cache = step_loss(cached, ToyFamily(), models, ToyTrained(models.denoiser), Draws.seeded(3))
    assert by_pixels.item() == pytest.approx(by_cache.item(), rel=1e-6)


def test_the_text_encoder_learns_only_when_it_is_trained(models):
    batch = Batch(["cat"], torch.ones(1), latents=torch.zeros(1, 4, 2, 3))
    trained = ToyTrained(models.denoiser)
    step_loss(batch, ToyFamily(), models, trained, Draws.seeded(3)).backward()
    assert models.text_encoders[0].weight.grad is None
    trained.trains_text_encoder = True
    step_loss(batch, ToyFamily(), models, trained, Draws.seeded(3)).backward()
    assert models.text_encoders[0].weight.grad.abs().item() > 0


def test_every_rank_and_every_step_has_its_own_seed():
    seeds = {step_seed(seed, rank, step) for seed in (0, 1) for rank in range(3) for step in range(50)}
    assert len(seeds) == 2 * 3 * 50
    assert step_seed(42, 1, 7) == step_seed(42, 1, 7)
    assert all(0 <= seed < 2**63 for seed in seeds)
