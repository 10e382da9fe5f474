"""DeepSpeed's engine is called as its documentation says; a stand-in with the same methods takes its place."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import distributed, nn

from library.flags.optimizer import OptimizerFlags
from library.flags.output import EmaFlags
from library.flags.run import DistributedFlags, StepFlags
from library.flags.settings import Settings
from library.train.deepspeed_updates import DeepSpeedUpdates, division_of
from library.train.division import Division
from library.train.state import ParameterGroups, Plan
from library.train.updates import FlatUpdates, Updates
from library.train.updating import updates_of_run
from tests.stand_ins.deepspeed import Engine

ACCUMULATION, MAX_NORM = 2, 0.05


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    """The engines that were made; the group of one process is given up after the test."""
    made: list[Engine] = []

    def initialize(**parts: Any) -> tuple[Engine, None, None, None]:
        made.append(Engine(**parts))
        return made[-1], None, None, None

    package = ModuleType("deepspeed")
    monkeypatch.setattr(package, "initialize", initialize, raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")  # so that it is as before after the test
    before = distributed.is_initialized()
    yield made
    if distributed.is_initialized() and not before:
        distributed.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


def updates(model: nn.Sequential, **distributed_flags: Any) -> Updates:
    flags = OptimizerFlags(optimizer_type="AdamW", learning_rate=0.01, max_grad_norm=MAX_NORM)
    groups = ParameterGroups(
        [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.02}], ["a", "b"]
    )
    settings = Settings.of(
        flags, DistributedFlags(**distributed_flags), StepFlags(gradient_accumulation_steps=ACCUMULATION),
        EmaFlags(ema_decay=0.5),
    )  # fmt: skip
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    return updates_of_run(settings, groups, accelerator, Plan.of(4, ACCUMULATION, 8, None))


def run(model: nn.Sequential, way: Updates) -> list[float]:
    norms = []
    for step in range(3):
        for part in range(ACCUMULATION):
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + part))
            way.backward(model(inputs).square().mean(), completes=part == ACCUMULATION - 1)
        norm = way.clip()
        assert norm is not None
        norms.append(float(norm))
        way.step()
        way.follow()
    return norms


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_updates_are_those_of_a_run_without_deepspeed(stage: int, engines: list[Engine]) -> None:
    one, other = net(), net()
    flat, divided = updates(one), updates(other, deepspeed=True, zero_stage=stage)
    assert isinstance(flat, FlatUpdates) and isinstance(divided, DeepSpeedUpdates)
    assert run(other, divided) == pytest.approx(run(one, flat), rel=1e-6)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(next(other.parameters()), next(net().parameters()))
    assert divided.average is not None and flat.average is not None
    kept = torch.cat([average.flatten() for average in divided.average.averages])
    assert float(kept.norm()) == pytest.approx(float(torch.cat(flat.average.averages).norm()), rel=1e-5)
    assert engines[0].boundaries == [False, True] * 3
    assert divided.schedule.get_last_lr() == flat.schedule.get_last_lr()


def test_the_flags_are_handed_on(engines: list[Engine]) -> None:
    updates(net(), deepspeed=True, zero_stage=1, offload_optimizer_device="cpu")
    updates(net(), deepspeed=True, zero_stage=0)
    (first, second) = (engine.config for engine in engines)
    assert first["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    assert (first["gradient_accumulation_steps"], first["gradient_clipping"]) == (ACCUMULATION, MAX_NORM)
    assert second["zero_optimization"] == {"stage": 0} and second["gradient_clipping"] == 0  # clipped outside
    assert engines[0].dist_init_required is False and distributed.get_world_size() == 1
    assert os.environ["LOCAL_RANK"] == "0"  # the engine asks for it


def test_a_gradient_that_is_not_finite_moves_no_weight_in_zero_0(engines: list[Engine]) -> None:
    model = net()
    way = updates(model, deepspeed=True, zero_stage=0)
    way.backward(model(torch.full((4, 5), float("nan"))).mean(), completes=True)
    norm = way.clip()
    assert norm is not None and not norm.isfinite()
    way.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("stage", "way"), [(0, None), (1, "--deepspeed --zero_stage=1")])
def test_zero_1_and_2_divide_what_has_to_be_saved(stage: int, way: str | None) -> None:
    settings = Settings.of(DistributedFlags(deepspeed=True, zero_stage=stage))
    division = division_of(settings, Accelerator())
    assert division == (None if way is None else Division(way, 1, 0, torch.device("cpu")))
    assert division_of(Settings.of(), Accelerator()) is None


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_that_are_written_from_outside_are_those_that_are_updated(stage: int, engines: list[Engine]) -> None:
    one, other = net(), net()
    first = updates(one, deepspeed=True, zero_stage=stage)
    run(one, first)
    second = updates(other, deepspeed=True, zero_stage=stage)
    with torch.no_grad():
        for target, source in zip(other.parameters(), one.parameters(), strict=True):
            target.copy_(source)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.schedule.load_state_dict(first.schedule.state_dict())
    second.take_weights()
    assert run(one, first) == run(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weights_cannot_be_taken_out_of_the_engine(engines: list[Engine]) -> None:
    with pytest.raises(ValueError, match="--deepspeed cannot leave group 0 as it is"):
        updates(net(), deepspeed=True).retire(0)


@pytest.mark.usefixtures("engines")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="needs the package deepspeed .*: pip install deepspeed"):
        updates(net(), deepspeed=True)
