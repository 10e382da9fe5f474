"""One autoencoder, whatever layout its file has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from library.files.weights import open_weights, save_safetensors
from library.models.vae.sd import build_vae, decode, encode, vae_sources

WIDTHS = (32, 64)


def published_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def ldm_name(name: str) -> str:
    """The name in the published layout, written down the other way round than the loader does."""
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"(?<=\.)resnets\.", "block.", name)
    for ours, published in {
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(ours, published)
    return name


def as_ldm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ldm_name(name): value for name, value in weights.items()}


def as_ldm_with_convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value[..., None, None] if "attn_1" in name and value.ndim == 2 else value
        for name, value in as_ldm(weights).items()
    }


def with_former_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights.items():
        for new, old in former.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    return renamed


def in_whole_checkpoint(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"first_stage_model.{name}": value for name, value in as_ldm_with_convolutions(weights).items()}
    return tensors | {"model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(5)}


def with_training_leftovers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return as_ldm(weights) | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}


def test_the_names_of_this_test_are_the_published_ones() -> None:
    names = [ldm_name(name) for name in published_vae().state_dict()]
    for name in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.0.downsample.conv.bias",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.mid.block_2.conv2.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.norm_out.weight",
    ):
        assert name in names


@pytest.mark.parametrize(
    "layout",
    [
        dict,
        as_ldm,
        as_ldm_with_convolutions,
        with_former_names,
        in_whole_checkpoint,
        with_training_leftovers,
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".bin"])
def test_every_layout_gives_the_same_autoencoder(tmp_path: Path, layout: object, ending: str) -> None:
    theirs = published_vae()
    tensors = layout(theirs.state_dict())  # type: ignore[operator]
    path = tmp_path / f"vae{ending}"
    if ending == ".safetensors":
        save_safetensors(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    with open_weights(path) as file:
        ours = build_vae(vae_sources(file), torch.float32, "cpu")
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(ours.encode(pixels).latent_dist.mean, theirs.encode(pixels).latent_dist.mean)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3)}, path)
    with (
        open_weights(path) as file,
        pytest.raises(ValueError, match=r"a\.safetensors is a CLIP text encoder alone, not"),
    ):
        vae_sources(file)


def test_half_an_autoencoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = {name: value for name, value in published_vae().state_dict().items() if name.startswith("encoder.")}
    save_safetensors(weights, path)
    with (
        open_weights(path) as file,
        pytest.raises(ValueError, match=r"no autoencoder is in it: decoder\.conv_in\.weight"),
    ):
        build_vae(vae_sources(file), torch.float32, "cpu")


def overflowing_vae(part: str) -> AutoencoderKL:
    """A VAE whose `part` is beyond the largest float16 inside, and of usual size in the end."""
    vae = published_vae()
    with torch.no_grad():
        mid = vae.encoder.mid_block if part == "encoder" else vae.decoder.mid_block
        mid.resnets[1].conv2.weight.mul_(1e6)  # the norms that follow bring it back
    return vae


@torch.no_grad()
def test_a_vae_that_overflows_in_half_precision_goes_on_in_float32_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = overflowing_vae("decoder").decode(latents).sample
    half = overflowing_vae("decoder").to(torch.float16)
    assert not half.decode(latents.half()).sample.isfinite().all()
    pixels = decode(half, latents.half())
    assert pixels.isfinite().all() and next(half.parameters()).dtype == torch.float32
    assert (pixels - expected).norm() < 0.01 * expected.norm()
    again = decode(half, latents.half())
    assert torch.equal(again, pixels)
    assert [record.message for record in caplog.records if record.name == "library.models.vae.sd"] == [
        "the VAE gives values that are not numbers in float16, as that of SDXL does: it goes on in float32 "
        "(--no_half_vae does so from the start)"
    ]


@torch.no_grad()
def test_latents_of_a_vae_that_overflows_are_those_of_float32() -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vae = overflowing_vae("encoder")
    expected = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(5))
    half = overflowing_vae("encoder").to(torch.float16)
    latents = encode(half, picture.half(), torch.Generator().manual_seed(5))
    assert latents.dtype == torch.float32
    assert (latents - expected).norm() < 0.01 * expected.norm()


@torch.no_grad()
def test_a_vae_that_does_not_overflow_stays_in_half_precision() -> None:
    half = published_vae().to(torch.float16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(decode(half, latents), half.decode(latents).sample)
    assert next(half.parameters()).dtype == torch.float16
