"""Flat parameters give the numbers that separate ones give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.train.flat_parameters import FlatParameters


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.Tanh(), nn.Linear(3, 1))


def groups_of(net: nn.Sequential) -> list[dict]:
    return [
        {"params": list(net[0].parameters()), "lr": 1e-2},
        {"params": [*net[2].parameters(), *net[4].parameters()], "lr": 3e-2, "weight_decay": 0.0},
    ]


def backward(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    net(torch.randn(4, 5)).square().mean().backward()


@pytest.mark.parametrize("elementwise", [True, False])
def test_adamw_on_flat_parameters_equals_adamw_on_each(elementwise: bool) -> None:
    plain = model()
    flat_net = copy.deepcopy(plain)
    plain_optimizer = torch.optim.AdamW(groups_of(plain), weight_decay=0.1)
    flat = FlatParameters(groups_of(flat_net))
    flat_optimizer = torch.optim.AdamW(flat.optimizer_groups(elementwise), weight_decay=0.1)
    for step in range(6):
        plain_optimizer.zero_grad()
        flat.zero_grad()
        for part in range(2):  # two backwards: gradients accumulate in place
            backward(plain, 2 * step + part)
            backward(flat_net, 2 * step + part)
        # Of the same gradients: those of the other net differ by the roundings of the steps before.
        own = torch.cat([parameter.grad.flatten() for parameter in flat_net.parameters()]).double().norm()
        assert flat.clip_(0.05).item() == pytest.approx(own.item(), rel=1e-6)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        plain_optimizer.step()
        flat_optimizer.step()
        flat.check()
    for ours, theirs in zip(flat_net.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)


def test_groups_keep_their_settings_and_become_one_parameter_each() -> None:
    flat = FlatParameters(groups_of(model()))
    first, second = flat.optimizer_groups(elementwise=True)
    assert (first["lr"], second["lr"], second["weight_decay"]) == (1e-2, 3e-2, 0.0)
    assert [len(first["params"]), len(second["params"])] == [1, 1]
    assert len(flat.optimizer_groups(elementwise=False)[1]["params"]) == 3


def test_small_gradients_are_not_clipped() -> None:
    net = model()
    flat = FlatParameters(groups_of(net))
    backward(net, 0)
    before = flat.gradients[0].clone()
    flat.clip_(1e6)
    assert torch.equal(flat.gradients[0], before)


def test_dtypes_have_buffers_of_their_own() -> None:
    net = model()
    net[2].to(torch.bfloat16)
    flat = FlatParameters(groups_of(net))
    assert {grads.dtype for grads in flat.gradients} == {torch.float32, torch.bfloat16}
    second = flat.optimizer_groups(elementwise=True)[1]
    assert {parameter.dtype for parameter in second["params"]} == {torch.float32, torch.bfloat16}
    net[0].weight.grad.fill_(1.0)
    net[2].weight.grad.fill_(2.0)
    expected = (35 * 1.0 + 21 * 4.0) ** 0.5
    assert flat.clip_(1.0).item() == pytest.approx(expected, rel=1e-6)
    assert flat.norm().item() == pytest.approx(1.0, rel=1e-2)


def test_a_parameter_that_backward_never_reaches_stays_as_it_is() -> None:
    net = model()
    unused = nn.Parameter(torch.full((3,), 2.0))
    flat = FlatParameters([*groups_of(net), {"params": [unused], "lr": 1e-2}])
    optimizer = torch.optim.AdamW(flat.optimizer_groups(elementwise=True), weight_decay=0.0)
    backward(net, 0)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.full((3,), 2.0))
    assert torch.equal(unused.grad, torch.zeros(3))


def test_reduction_covers_every_gradient_in_one_call() -> None:
    net = model()
    flat = FlatParameters(groups_of(net))
    backward(net, 0)
    weight_grad = net[0].weight.grad.clone()
    calls = []

    def halve(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.numel())
        return tensor / 2

    flat.all_reduce(halve)
    assert len(calls) == 1
    assert torch.equal(net[0].weight.grad, weight_grad / 2)


def test_gradients_that_exist_already_are_kept() -> None:
    net = model()
    backward(net, 0)
    before = net[0].weight.grad.clone()
    FlatParameters(groups_of(net))
    assert torch.equal(net[0].weight.grad, before)


def test_the_check_notices_replaced_gradients_and_moved_parameters() -> None:
    net = model()
    flat = FlatParameters(groups_of(net))
    flat.check()
    net[0].weight.grad = None
    with pytest.raises(AssertionError, match="gradient of a parameter of shape \\[7, 5\\] was replaced"):
        flat.check()
    net = model()
    flat = FlatParameters(groups_of(net))
    net[2].weight.data = net[2].weight.data.clone()
    with pytest.raises(AssertionError, match="moved out of its flat buffer"):
        flat.check()
    net = model()
    flat = FlatParameters(groups_of(net))
    torch.optim.SGD(flat.optimizer_groups(elementwise=True)).zero_grad()
    with pytest.raises(AssertionError, match="set to None"):
        flat.check()


def test_a_parameter_in_two_groups_is_refused() -> None:
    net = model()
    with pytest.raises(AssertionError, match="two optimizer groups"):
        FlatParameters([{"params": [net[0].weight], "lr": 1.0}, {"params": [net[0].weight], "lr": 2.0}])
