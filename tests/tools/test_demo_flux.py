"""Are the small FLUX and Chroma models what their names say, and is everything there?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo_flux_folder import KINDS, FluxDemo
from demo_flux_weights import FluxSizes, small_autoencoder, small_transformer
from library.generation.prompt_line import read_prompts
from library.models.flux.checkpoint import load_transformer
from library.models.flux.patches import pack, unpack


def answer(demo: FluxDemo, kind: str, x: Tensor) -> Tensor:
    model = load_transformer(demo.transformer(kind), "chroma" if kind == "chroma" else "flux", torch.float32, "cpu")
    size = (x.shape[2] // 2, x.shape[3] // 2)
    one = torch.ones(1)
    with torch.no_grad():
        return unpack(model(pack(x), torch.randn(1, 5, 32), one, one, torch.randn(1, 64), size), size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_untrained_answer_to_noise_is_mostly_the_noise(small_flux: FluxDemo, kind: str) -> None:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    found = answer(small_flux, kind, noise)
    assert torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1] > 0.9
    assert 0.7 < found.std() < 1.3


def test_the_same_arguments_give_the_same_weights() -> None:
    sizes = FluxSizes(double_blocks=1, single_blocks=1)
    first, second = small_transformer(sizes, "chroma"), small_transformer(sizes, "chroma")
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    assert not any("guidance_in" in key for key in small_transformer(sizes, "schnell"))


def test_the_autoencoder_has_sixteen_channels_and_no_convolution_around_them() -> None:
    tensors = small_autoencoder(FluxSizes())
    assert tensors["encoder.conv_out.weight"].shape[0] == 32 and tensors["decoder.conv_in.weight"].shape[1] == 16
    assert not any("quant_conv" in key for key in tensors)


def test_prompts_and_pictures_are_there(small_flux: FluxDemo) -> None:
    first, second = read_prompts(small_flux.prompts)
    assert (first.guidance_scale, first.steps, second.scale, second.negative_prompt) == (1.0, 4, 2.0, "red")
    assert len(list(small_flux.pictures.glob("*.png"))) == 12
    assert Path(small_flux.dataset).is_file()
