"""GGPO nudges weights while they are trained, by what the last gradient says, and leaves everything else alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.core.adapter import Dropout, Strength, stand_in
from networks.core.lora_adapter import LoraAdapter, LoraTraining
from networks.core.perturbation import Ggpo, mean_row_norm, squared_row_norms

GGPO = Ggpo(sigma=0.1, beta=0.5)


def adapted(parts: tuple[int, ...] = (), ggpo: Ggpo | None = GGPO) -> tuple[nn.Sequential, LoraAdapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).requires_grad_(False)
    adapter = LoraAdapter(model[0], 2, 1.0, Dropout(), Strength(), parts, LoraTraining(ggpo=ggpo))
    for up in adapter.lora_up.parameters():
        nn.init.normal_(up)
    stand_in(model, "0", adapter)
    return model, adapter


def after_a_step(parts: tuple[int, ...] = ()) -> tuple[nn.Sequential, LoraAdapter, Tensor]:
    model, adapter = adapted(parts)
    x = torch.randn(3, 6)
    model(x).square().sum().backward()
    adapter.follow_gradient()
    return model, adapter, x


def test_row_norms_are_those_of_the_product() -> None:
    up, down = torch.randn(8, 3), torch.randn(3, 6)
    assert torch.allclose(squared_row_norms(up, down).sqrt(), (up @ down).norm(dim=1, keepdim=True), atol=1e-5)


def test_the_base_norm_looks_at_a_thousand_rows_of_a_large_weight() -> None:
    layer = nn.Linear(3, 4001)
    assert mean_row_norm(layer) == pytest.approx(float(layer.weight.detach()[::5].norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("parts", [(), (2, 2, 4)])
def test_sizes_are_what_the_formula_says(parts: tuple[int, ...]) -> None:
    model, adapter, _ = after_a_step(parts)
    up, down = adapter.lora_up.weight, adapter.lora_down.weight
    base = model[0].weight.norm(dim=1).mean()
    norms = (base**2 + (up @ down).square().sum(1)).sqrt()
    if parts:
        d_up = torch.block_diag(*(weight.grad for weight in adapter.lora_up.parameters()))
        d_down = torch.cat([weight.grad for weight in adapter.lora_down.parameters()])
    else:
        d_up, d_down = up.grad, down.grad
    gradient = adapter.scale * (up @ d_down + d_up @ down)
    expected = (0.1 * norms + 0.5 * gradient.square().sum(1)) / 8**0.5
    assert torch.allclose(adapter.perturbation.size.flatten(), expected, rtol=1e-4)


def test_nothing_is_nudged_before_the_first_update_and_outside_training() -> None:
    model, adapter = adapted()
    plain, _ = adapted(ggpo=None)
    x = torch.randn(3, 6)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    model, adapter, x = after_a_step()
    adapter.eval()
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_the_nudge_is_part_of_the_layer_forward_and_backward() -> None:
    model, adapter, x = after_a_step()
    for parameter in adapter.parameters():
        parameter.grad = None
    torch.manual_seed(5)
    nudge = torch.randn(8, 6) * adapter.perturbation.size
    x = x.requires_grad_(True)
    torch.manual_seed(5)
    model(x).square().sum().backward()
    found = x.grad, adapter.lora_down.weight.grad.clone(), adapter.lora_up.weight.grad.clone()
    layer, z = model[0], x.detach().requires_grad_(True)
    down, up = (w.detach().requires_grad_(True) for w in (adapter.lora_down.weight, adapter.lora_up.weight))
    y = F.linear(z, layer.weight + nudge, layer.bias) + 0.5 * F.linear(F.linear(z, down), up)
    y.square().sum().backward()
    for ours, theirs in zip(found, (z.grad, down.grad, up.grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_layer_with_its_own_forward_is_nudged_too() -> None:
    model, adapter, x = after_a_step()
    torch.manual_seed(5)
    expected = model(x)
    base = nn.Sequential(nn.Linear(6, 8))
    base[0].load_state_dict(model[0].state_dict())
    plain = base[0]
    base[0].forward = lambda value: F.linear(value, plain.weight, plain.bias)
    stand_in(base, "0", adapter)
    torch.manual_seed(5)
    assert torch.allclose(base(x), expected, atol=1e-5)


def test_checkpointing_computes_the_same_nudge_again() -> None:
    gradients = []
    for recompute in (False, True):
        model, adapter, x = after_a_step()
        for parameter in adapter.parameters():
            parameter.grad = None
        torch.manual_seed(7)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_of_a_run_has_the_sizes_and_a_file_has_not() -> None:
    _, adapter, _ = after_a_step()
    assert [name for name, _ in adapter.named_buffers()] == ["alpha", "perturbation.size"]
    assert sorted(adapter.state_dict()) == ["alpha", "lora_down.weight", "lora_up.weight"]
    assert sorted(adapter.file_tensors()) == ["alpha", "lora_down.weight", "lora_up.weight"]


def test_a_step_without_gradients_is_an_error() -> None:
    _, adapter = adapted()
    with pytest.raises(ValueError, match="--fused_backward_pass"):
        adapter.follow_gradient()
