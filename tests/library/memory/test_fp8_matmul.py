from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory.fp8 import Format, Scaling, dequantize, quantize
from library.memory.fp8_matmul import Float8Linear, float8_product, is_available, rounded_rows
from library.memory.frozen_layers import attach_frozen_layers
from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.base_layer import BaseLayer
from networks.core.lora_adapter import LoraAdapter


def layer(scaling: Scaling, sides: tuple[int, int] = (64, 48)) -> tuple[nn.Sequential, nn.Linear]:
    """A float8 layer that calculates in float8, and a plain one on the same numbers."""
    torch.manual_seed(0)
    plain = nn.Linear(*sides).requires_grad_(False)
    weight, scale = quantize(plain.weight, Format(scaling))
    rounded = nn.Linear(*sides).requires_grad_(False)
    rounded.load_state_dict(plain.state_dict())
    rounded.weight = nn.Parameter(weight, requires_grad=False)
    plain.weight.copy_(dequantize(weight, scale, torch.float32))
    holder = nn.Sequential(rounded)
    attach_frozen_layers(holder, {} if scale is None else {"0": scale}, linear=Float8Linear)
    return holder, plain


def results(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = module(x)
    y.sin().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("scaling", [Scaling.NONE, Scaling.CHANNEL])
def test_products_of_rounded_numbers_are_as_close_as_three_bits_allow(scaling: Scaling) -> None:
    rounded, plain = layer(scaling)
    (y, dx), (exact, exact_dx) = results(rounded), results(plain)
    # Rounding to 3 bits errs by 1/16 at most and by 2.6 % on average, of each factor that is rounded.
    assert 0.005 < error(y, exact) < 0.035
    assert 0.005 < error(dx, exact_dx) < 0.05


def test_a_row_of_large_numbers_does_not_hurt_the_others() -> None:
    x = torch.randn(4, 64)
    x[1] *= 1e4
    rounded, scale = rounded_rows(x)
    assert scale.shape == (4, 1) and error(rounded.float() * scale, x) < 0.035
    assert all(error(rounded[i].float() * scale[i], x[i]) < 0.035 for i in range(4))


def test_a_matrix_with_odd_sides_is_calculated_with_in_full() -> None:
    rounded, plain = layer(Scaling.CHANNEL, (64, 40))
    torch.testing.assert_close(results(rounded), results(plain))


def test_an_adapter_beside_it_calculates_in_full() -> None:
    found = []
    for base in (layer(Scaling.CHANNEL)[0], nn.Sequential(layer(Scaling.CHANNEL)[1])):
        torch.manual_seed(2)
        adapter = LoraAdapter(base[0], 4, 4.0, Dropout(), Strength())
        nn.init.normal_(adapter.lora_up.weight)
        without = results(base)[0]
        stand_in(base, "0", adapter)
        found.append(results(base)[0] - without)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_kind_that_needs_the_weight_reads_it_with_its_scale() -> None:
    rounded, plain = (holder[0] for holder in (layer(Scaling.CHANNEL)[0], [layer(Scaling.CHANNEL)[1]]))
    torch.testing.assert_close(BaseLayer(rounded).weight(torch.float32), plain.weight)


def test_the_cpu_can_try_it_out() -> None:
    assert is_available(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_the_products_of_the_gpu_are_those_that_are_imitated(scaled: bool) -> None:
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(96, 128)
    rounded, scale = quantize(weight, Format(Scaling.CHANNEL if scaled else Scaling.NONE))
    expected = float8_product(x, rounded, scale, torch.bfloat16)
    found = float8_product(x.cuda(), rounded.cuda(), None if scale is None else scale.cuda(), torch.bfloat16)
    assert error(found.cpu().float(), expected.float()) < 0.005
