from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.fp8 import Format, Scaling, dequantize, quantize
from library.memory.frozen_layers import attach_frozen_layers, frozen_layers
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter
from tests.library.memory.toys import adapt, saved_for_backward, small_model


def rounded(layer: Any, scaling: Scaling) -> tuple[nn.Module, nn.Module]:
    """`layer` in float8 with a handle, and a plain layer with the numbers that it stands for."""
    torch.manual_seed(0)
    layer.requires_grad_(False)
    plain = type(layer)(*layer.made_of).requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    weight, scale = quantize(layer.weight, Format(scaling, block=4))
    plain.weight.copy_(dequantize(weight, scale, torch.float32))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.Sequential(layer)
    attach_frozen_layers(holder, scales={} if scale is None else {"0": scale})
    return holder[0], plain


class Linear(nn.Linear):
    made_of = (16, 24)
    forward = nn.Linear.forward


class Convolution(nn.Conv2d):
    made_of = (4, 6, 3, 2, 1)
    forward = nn.Conv2d.forward


def results(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("scaling", list(Scaling))
@pytest.mark.parametrize("kind", [Linear, Convolution])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_calculates_as_a_plain_one_on_the_same_numbers(
    kind: Any, scaling: Scaling, dtype: torch.dtype
) -> None:
    layer, plain = rounded(kind(*kind.made_of), scaling)
    x = torch.randn(3, 5, 16) if kind is Linear else torch.randn(2, 4, 7, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for ours, theirs in zip(results(layer, x), results(plain, x), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scaling", [Scaling.NONE, Scaling.CHANNEL, Scaling.BLOCK])
def test_an_adapter_on_rounded_weights_gives_what_it_gives_on_the_plain_ones(scaling: Scaling) -> None:
    layer, plain = rounded(Linear(16, 24), scaling)
    found = []
    for base in (layer, plain):
        holder = nn.Sequential(base)
        torch.manual_seed(1)
        adapter = LoraAdapter(base, 4, 2.0, Dropout(), Strength())
        nn.init.normal_(adapter.lora_up.weight)
        stand_in(holder, "0", adapter)
        y, dx = results(holder, torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)))
        found.append([y, dx, adapter.lora_down.weight.grad, adapter.lora_up.weight.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_backward_keeps_no_weight_and_no_copy_of_one() -> None:
    layer, _ = rounded(Linear(16, 24), Scaling.BLOCK)
    x = torch.randn(2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_for_backward(lambda: layer(x)) == 0
        holder = nn.Sequential(layer)
        adapter = LoraAdapter(layer, 4, 2.0, Dropout(), Strength())
        stand_in(holder, "0", adapter)
        kept = saved_for_backward(lambda: holder(x))
    thin = 2 * (4 * 16 + 24 * 4)
    assert kept == 2 * 2 * 16 + thin + 2 * 2 * 4  # x in 16 bits, both thin matrices, what lies between them


def test_only_frozen_plain_layers_get_a_handle() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1, padding_mode="circular")
    )
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    attach_frozen_layers(model, wanted=lambda layer: True)
    assert [module for module, _ in frozen_layers(model)] == [model[1]]


def test_a_layer_under_an_adapter_has_one_handle() -> None:
    model = small_model(2)
    before = [handle for _, handle in frozen_layers(model)]
    adapt(model.blocks)
    assert [handle for _, handle in frozen_layers(model)] == before and len(before) == 4


def test_a_module_that_would_calculate_with_float8_gets_16_bits() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)).requires_grad_(False).to(torch.float8_e4m3fn)
    attach_frozen_layers(model)
    assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.dtype == torch.float8_e4m3fn
