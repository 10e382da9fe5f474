"""Stable Diffusion as the trainer sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo_folder import DemoFolder
from library.flags.dataset import CaptionFlags
from library.flags.model import ModelFlags
from library.flags.monitor import PreviewFlags
from library.flags.objective import NoiseFlags
from library.flags.settings import Settings
from library.memory.checkpointing import checkpoint_blocks
from library.models.architecture import Condition, ImageRequest
from library.models.sd.architecture import StableDiffusion
from library.models.sd.unet import UNet

CPU = torch.device("cpu")


def architecture(small_sd: DemoFolder, *groups: Any, **model: Any) -> StableDiffusion:
    flags = ModelFlags(
        pretrained_model_name_or_path=str(small_sd.checkpoint), tokenizer_cache_dir=str(small_sd.tokenizers)
    )
    return StableDiffusion(Settings.of(replace(flags, **model), *groups))


@pytest.fixture(scope="module")
def unet(small_sd: DemoFolder) -> nn.Module:
    return architecture(small_sd).load_denoiser(torch.float32, CPU)


def test_captions_become_rows_of_77_and_a_context(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd)
    tokens = arch.tokenize(["drawing, one white star", ""])
    assert set(tokens) == {"input_ids"} and tokens["input_ids"].shape == (2, 1, 77)
    encoders = arch.load_text_encoders(torch.float32, CPU)
    with torch.no_grad():
        assert arch.encode_text(encoders, tokens)["context"].shape == (2, 77, 64)
    assert arch.encode_text([None], tokens) == {}
    assert arch.encode_text([], tokens) == {}


@pytest.mark.parametrize(("length", "rows"), [(None, 1), (150, 2), (225, 3)])
def test_max_token_length_decides_the_number_of_rows(small_sd: DemoFolder, length: int | None, rows: int) -> None:
    arch = architecture(small_sd, max_token_length=length)
    tokens = arch.tokenize(["one star"])
    assert tokens["input_ids"].shape == (1, rows, 77)
    with torch.no_grad():
        context = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), tokens)["context"]
    assert context.shape == (1, 75 * rows + 2, 64)


def test_weights_come_only_with_weighted_captions(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd, CaptionFlags(weighted_captions=True))
    tokens = arch.tokenize(["(star:1.5) blue"])
    plain = architecture(small_sd).tokenize(["star blue"])
    assert torch.equal(tokens["input_ids"], plain["input_ids"])
    assert 1.5 in tokens["weights"][0, 0].tolist()
    encoders = arch.load_text_encoders(torch.float32, CPU)
    with torch.no_grad():
        weighted = arch.encode_text(encoders, tokens)["context"]
        unweighted = arch.encode_text(encoders, plain)["context"]
    factor = tokens["weights"][0, 0][:, None]
    torch.testing.assert_close(weighted[0], unweighted[0] * factor)


def test_prompts_of_one_picture_have_one_length_and_marks_in_every_row(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd)
    encoders = arch.load_text_encoders(torch.float32, CPU)
    with torch.no_grad():
        both = arch.encode_prompts(encoders, [", ".join(["one blue star"] * 40), ""])["context"]
        single = arch.encode_prompts(encoders, ["star", ""])["context"]
    assert both.shape[0] == 2 and both.shape[1] in (154, 231)
    assert single.shape == (2, 77, 64)


def test_clip_skip_beyond_the_encoder_is_refused(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd, clip_skip=9)
    with pytest.raises(ValueError, match="--clip_skip 9: the text encoder of .* has 2 layers"):
        arch.load_text_encoders(torch.float32, CPU)


def test_images_become_latents_drawn_with_the_given_generators(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd)
    vae = arch.load_vae(torch.float32, CPU)
    pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    with torch.no_grad():
        latents = arch.encode_image(vae, pixels, seeded(1))
        again = arch.encode_image(vae, pixels, seeded(1))
        apart = arch.encode_image(vae, pixels, [seeded(3), seeded(4)])
        alone = arch.encode_image(vae, pixels[1:], seeded(4))
        decoded = arch.decode_latents(vae, arch.scale_latents(latents))
        assert torch.equal(decoded, vae.decode(arch.scale_latents(latents) / 0.18215).sample)
    assert latents.shape == (2, 4, 8, 8) and decoded.shape == (2, 3, 64, 64)
    assert torch.equal(latents, again)
    torch.testing.assert_close(apart[1:], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(arch.scale_latents(torch.ones(1)), torch.tensor([0.18215]))
    assert len(arch.vae_id()) == 16


class Recorder(nn.Module):
    """A denoiser that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x) == len(t) == len(context)
        self.contexts.append(context)
        return x * context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def sampled(arch: StableDiffusion, denoiser: nn.Module, **request: Any) -> Tensor:
    complete = arch.complete_request(ImageRequest("", width=64, height=72, steps=4, seed=5, **request))
    cond, uncond = (Condition({"context": torch.full((1, 3, 2), value)}) for value in (0.2, 0.1))
    with torch.no_grad():
        return arch.sample(denoiser, cond, uncond, complete)


def test_a_picture_depends_on_its_seed_and_guidance_only(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd, PreviewFlags(sample_sampler="euler_a"))
    denoiser = Recorder()
    torch.manual_seed(0)
    first = sampled(arch, denoiser, scale=3.0)
    assert all(context.shape == (2, 3, 2) for context in denoiser.contexts)
    torch.manual_seed(1)
    assert torch.equal(sampled(arch, Recorder(), scale=3.0), first)
    assert first.shape == (1, 4, 9, 8) and first.isfinite().all()
    without = Recorder()
    assert not torch.equal(sampled(arch, without, scale=1.0), first)
    assert all(context.shape == (1, 3, 2) for context in without.contexts)


def test_requests_are_completed_with_defaults_on_the_grid(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd, PreviewFlags(sample_sampler="euler"))
    request = arch.complete_request(ImageRequest("x"))
    assert (request.width, request.height, request.steps, request.scale) == (512, 512, 30, 7.5)
    assert request.sampler == "euler" and request.seed is None
    odd = arch.complete_request(ImageRequest("x", width=519, height=10, scale=0.0, sampler="ddim", steps=7))
    assert (odd.width, odd.height, odd.scale, odd.sampler, odd.steps) == (512, 64, 0.0, "ddim", 7)


def test_recomputed_blocks_give_the_same_gradients_and_start_at_the_first_trained_layer(
    small_sd: DemoFolder,
) -> None:
    arch = architecture(small_sd)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 64)

    def gradient(recompute: bool) -> tuple[Tensor, int]:
        denoiser = arch.load_denoiser(torch.float32, CPU)
        assert isinstance(denoiser, UNet)
        runs = []
        denoiser.mid_block.resnets[0].register_forward_hook(lambda *_: runs.append(1))
        if recompute:
            checkpoint_blocks(arch.blocks(denoiser))
        trained = denoiser.mid_block.get_parameter("attentions.0.transformer_blocks.0.attn2.to_q.weight")
        trained.requires_grad_(True)
        arch.predict(denoiser, x, t, Condition({"context": context})).square().mean().backward()
        assert trained.grad is not None
        return trained.grad, len(runs)

    plain, once = gradient(False)
    recomputed, twice = gradient(True)
    assert (once, twice) == (1, 2)
    assert torch.equal(plain, recomputed)


def test_recomputed_text_layers_give_the_same_gradients(small_sd: DemoFolder) -> None:
    arch = architecture(small_sd)
    grads = []
    for recompute in (False, True):
        (encoder,) = arch.load_text_encoders(torch.float32, CPU)
        encoder.requires_grad_(True)
        if recompute:
            checkpoint_blocks(arch.encoder_blocks(encoder))
        arch.encode_text([encoder], arch.tokenize(["one star"]))["context"].square().mean().backward()
        grads.append(encoder.get_parameter("encoder.layers.0.self_attn.q_proj.weight").grad)
    assert grads[0] is not None and torch.equal(grads[0], grads[1])


@pytest.mark.parametrize(
    ("v2", "v", "version", "spec", "resolution"),
    [
        (False, False, "sd_v1", "stable-diffusion-v1", "512x512"),
        (False, True, "sd_v1_v", "stable-diffusion-v1", "512x512"),
        (True, False, "sd_v2", "stable-diffusion-v2-512", "512x512"),
        (True, True, "sd_v2_v", "stable-diffusion-v2-768-v", "768x768"),
    ],
)
def test_versions_have_their_published_names(v2: bool, v: bool, version: str, spec: str, resolution: str) -> None:
    arch = StableDiffusion(Settings.of(ModelFlags(v2=v2, v_parameterization=v)))
    assert arch.base_model_version() == version
    assert arch.model_spec() == {
        "architecture": spec,
        "implementation": "diffusers",
        "resolution": resolution,
        "prediction_type": "v" if v else "epsilon",
    }
    assert arch.metadata() == {}
    assert arch.process.v_parameterization is v


def test_a_run_without_a_model_says_which_flag_is_missing() -> None:
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is needed"):
        StableDiffusion(Settings.of(ModelFlags())).load_vae(torch.float32, CPU)


def test_the_answer_of_the_unet_is_finite_and_has_the_shape_of_its_input(unet: nn.Module, small_sd: DemoFolder) -> None:
    arch = architecture(small_sd, NoiseFlags())
    with torch.no_grad():
        out = arch.predict(
            unet, torch.randn(2, 4, 8, 16), torch.tensor([1, 999]), Condition({"context": torch.randn(2, 77, 64)})
        )
    assert out.shape == (2, 4, 8, 16) and out.isfinite().all()


def test_a_vae_flag_takes_the_autoencoder_from_elsewhere(small_sd: DemoFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--vae: .*nope.safetensors"):
        architecture(small_sd, vae=str(tmp_path / "nope.safetensors")).load_vae(torch.float32, CPU)
    arch = architecture(small_sd, vae=str(small_sd.checkpoint), pretrained_model_name_or_path="not/used")
    assert arch.load_vae(torch.float16, CPU).dtype == torch.float16
