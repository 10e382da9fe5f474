from __future__ import annotations

import pytest
import torch
from torch import nn

from library.models.norms import GroupNorm, LayerNorm
from step_counts import AutocastOfGpus

NORMS = [(LayerNorm(16), nn.LayerNorm(16)), (GroupNorm(4, 16), nn.GroupNorm(4, 16))]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def twin(norm: nn.Module, usual: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        norm.weight.copy_(1 + drawn(16) / 4)
        norm.bias.copy_(drawn(16) / 4)
    norm.to(dtype)
    usual.to(dtype).load_state_dict(norm.state_dict())


@pytest.mark.parametrize(("norm", "usual"), NORMS)
def test_the_answer_is_that_of_autocast_rounded_once(norm: nn.Module, usual: nn.Module) -> None:
    twin(norm, usual, torch.bfloat16)
    x = drawn(3, 16, 16).bfloat16().requires_grad_()
    with AutocastOfGpus(), torch.autocast("cpu", torch.bfloat16):
        found, expected = norm(x), usual(x)
    assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
    # rounding to 8 bits errs by 2 ** -9 of a number at most, and near 0 by what its sum of two is wrong by
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=2**-9)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    (other,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(gradient.float(), other.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("norm", "usual"), NORMS)
def test_weights_that_are_trained_in_float32_are_not_rounded(norm: nn.Module, usual: nn.Module) -> None:
    twin(norm, usual, torch.float32)
    x = drawn(3, 16, 16).bfloat16()
    with AutocastOfGpus(), torch.autocast("cpu", torch.bfloat16):
        found, expected = norm(x), usual(x)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(("norm", "usual"), NORMS)
def test_without_autocast_they_are_the_usual_norms(norm: nn.Module, usual: nn.Module) -> None:
    twin(norm, usual, torch.float32)
    x = drawn(3, 16, 16)
    assert torch.equal(norm(x), usual(x))
