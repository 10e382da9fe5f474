"""Our U-Net has the weights of diffusers' and answers as it does."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from library.models.attention import AttentionMode
from library.models.sd.unet import UNet, UNetShape

V1 = UNetShape(
    widths=(32, 64, 64),
    num_heads=(8, 8, 8),
    depths=(1, 1, 0),
    mid_depth=1,
    layers_per_level=2,
    context_dim=24,
    time_dim=128,
    use_linear=False,
)
V2 = UNetShape(
    widths=(64, 128, 128),
    num_heads=(1, 2, 2),
    depths=(1, 1, 0),
    mid_depth=1,
    layers_per_level=1,
    context_dim=24,
    time_dim=256,
    use_linear=True,
)


def both(shape: UNetShape) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        block_out_channels=shape.widths,
        layers_per_block=shape.layers_per_level,
        cross_attention_dim=shape.context_dim,
        attention_head_dim=shape.num_heads,
        use_linear_projection=shape.use_linear,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    ours = UNet(shape)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def inputs(height: int = 12, width: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width), torch.tensor([3, 900]), torch.randn(2, 7, 24)


@pytest.mark.parametrize("shape", [V1, V2])
@pytest.mark.parametrize("mode", [AttentionMode.PLAIN, AttentionMode.SDPA, AttentionMode.MEMORY_EFFICIENT])
def test_answers_equal_those_of_diffusers_in_every_attention_mode(shape: UNetShape, mode: AttentionMode) -> None:
    ours, theirs = both(shape)
    ours.set_attention(mode)
    with torch.no_grad():
        expected = theirs(*inputs(), return_dict=False)[0]
        torch.testing.assert_close(ours(*inputs()), expected, atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_halve_evenly_come_back_whole() -> None:
    ours, theirs = both(V1)
    with torch.no_grad():
        out = ours(*inputs(13, 10))
        assert out.shape == (2, 4, 13, 10)
        torch.testing.assert_close(out, theirs(*inputs(13, 10), return_dict=False)[0], atol=1e-5, rtol=1e-5)


def test_half_precision_weights_take_half_precision_latents() -> None:
    ours, _ = both(V1)
    x, t, context = inputs()
    with torch.no_grad():
        out = ours.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert out.dtype == torch.bfloat16


def test_layers_that_other_network_modules_look_for_have_the_names_they_look_for() -> None:
    ours, _ = both(V1)
    names = {type(module).__name__ for module in ours.modules()}
    assert {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"} <= names
