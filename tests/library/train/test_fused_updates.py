"""Weights that are updated during the backward pass become those that are updated after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from demo_folder import DemoFolder
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.settings import Settings
from library.train.fused_updates import FusedUpdates
from library.train.state import ParameterGroups, Plan
from library.train.updates import FlatUpdates, Updates
from library.train.updating import updates_of_run
from tests.clients.continuing import TinyRuns, equal

ARGUMENTS = ("relative_step=False", "scale_parameter=False", "weight_decay=0.1", "beta1=0.9")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def net() -> nn.Sequential:
    """Two layers in use, and one that no gradient reaches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3))


def updates(model: nn.Sequential, fused: bool, max_grad_norm: float = 0.0) -> Updates:
    flags = OptimizerFlags(
        optimizer_type="Adafactor", learning_rate=0.01, max_grad_norm=max_grad_norm, optimizer_args=ARGUMENTS,
        fused_backward_pass=fused,
    )  # fmt: skip
    schedule = SchedulerFlags(lr_scheduler="constant_with_warmup", lr_warmup_steps=3)
    groups = ParameterGroups(
        [{"params": list(model[0].parameters())}, {"params": list(model[2:].parameters()), "lr": 0.02}], ["a", "b"]
    )
    return updates_of_run(Settings.of(flags, schedule), groups, Accelerator(), Plan.of(4, 1, 8, None))


def loss_of(model: nn.Sequential, step: int) -> Tensor:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return model[2](model[1](model[0](inputs))).square().mean()


def run(model: nn.Sequential, way: Updates) -> list[Tensor | None]:
    norms = []
    for step in range(5):
        way.backward(loss_of(model, step), completes=True)
        norms.append(way.clip())
        way.step()
    return norms


def test_both_ways_end_with_equal_bits() -> None:
    one, other = net(), net()
    flat, fused = updates(one, fused=False), updates(other, fused=True)
    assert isinstance(flat, FlatUpdates) and isinstance(fused, FusedUpdates)
    assert run(one, flat) == run(other, fused) == [None] * 5
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert not torch.equal(next(other.parameters()), next(net().parameters()))


def test_a_gradient_is_gone_before_the_next_one_is_made() -> None:
    model = net()
    way = updates(model, fused=True)
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in model.parameters()))
        )
    way.backward(loss_of(model, 0), completes=True)
    assert alive == [0] * 4  # called after ours, which has taken the gradient
    way.clip()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_tensor_is_clipped_by_its_own_norm() -> None:
    one, other = net(), net()
    way = updates(other, fused=True, max_grad_norm=0.01)
    loss_of(one, 0).backward()
    grads = [parameter.grad for parameter in one.parameters() if parameter.grad is not None]
    expected_norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
    for grad in grads:
        grad.mul_((0.01 / (grad.norm() + 1e-6)).clamp(max=1.0))
    plain = updates(one, fused=False)  # keeps the gradients that are there
    plain.clip()
    plain.step()
    way.backward(loss_of(other, 0), completes=True)
    torch.testing.assert_close(way.clip(), expected_norm)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_gradient_that_is_not_finite_moves_no_weight_and_shows_in_the_norm() -> None:
    model = net()
    way = updates(model, fused=True, max_grad_norm=1.0)
    way.backward(loss_of(model, 0) * float("nan"), completes=True)
    norm = way.clip()
    assert norm is not None and norm.isnan()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing",)], ids=["plain", "checkpointing"])
def test_a_network_trained_either_way_has_equal_bits(small_sd: DemoFolder, tmp_path: Path, more: tuple) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    words = (
        *("--cache_latents", "--max_train_steps", "3", "--optimizer_type", "Adafactor", "--max_grad_norm", "0"),
        *("--network_args", "module_dropout=0.3", *more),
    )
    runs.train("after", *words)
    runs.train("during", *words, "--fused_backward_pass")
    assert equal(runs.weights("after"), runs.weights("during"))


def test_several_ranks_average_the_tensors_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[tuple[int, ...]] = []
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr("library.train.fused_updates.mean_of_ranks", lambda grad: averaged.append(tuple(grad.shape)))
    orders = []
    for reached in ((0, 2), (2, 0)):  # the layers in the order of their use
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4, bias=False))
        way = updates(model, fused=True)
        way.backward(model[reached[1]](model[reached[0]](torch.ones(1, 4))).sum(), completes=True)
        way.clip()
        orders.append(list(averaged))
        averaged.clear()
    assert orders[0] == orders[1] == [(4, 4), (4,), (4, 4)]
