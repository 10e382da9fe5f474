from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.flags.optimizer import OptimizerFlags, SchedulerFlags, int_or_float
from library.train.optimizer import choose_optimizer, make_optimizer
from library.train.scheduler import make_scheduler, schedule_flags

CASES = json.loads((Path(__file__).parents[2] / "facts/training/lr_schedules.json").read_text(encoding="utf-8"))[
    "cases"
]


def case_name(case: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in case["settings"].items()) + f"-{case['num_processes']}"


def settings_of(case: dict[str, Any]) -> tuple[SchedulerFlags, OptimizerFlags, int]:
    settings = dict(case["settings"])
    total = settings.pop("max_train_steps")
    optimizer = OptimizerFlags(optimizer_type=settings.pop("optimizer_type", "SGD"), learning_rate=1.0)
    if "lr_scheduler_args" in settings:
        settings["lr_scheduler_args"] = tuple(settings["lr_scheduler_args"])
    return SchedulerFlags(**settings), optimizer, total


def rates(flags: SchedulerFlags, optimizer_flags: OptimizerFlags, total: int, steps: int) -> list[float]:
    """The rate used by each update of a parameter whose gradient is zero."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer(optimizer_flags, [{"params": [parameter]}])
    scheduler = make_scheduler(flags, optimizer, total)
    used = []
    for _ in range(steps):
        used.append(float(scheduler.get_last_lr()[0]))
        parameter.grad = torch.zeros(2, 2)
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("case", [c for c in CASES if "lr" in c and c["num_processes"] == 1], ids=case_name)
def test_every_recorded_schedule_of_one_process_is_followed(case: dict[str, Any]) -> None:
    flags, optimizer, total = settings_of(case)
    assert rates(flags, optimizer, total, len(case["lr"])) == pytest.approx(case["lr"], abs=1e-8)


# A warm-up of steps is left out where it has an effect: it was recorded half as long with two processes.
TWO_PROCESSES = [
    case
    for case in CASES
    if case["num_processes"] == 2
    and ("lr_warmup_steps" not in case["settings"] or "optimizer_type" in case["settings"])
]


@pytest.mark.parametrize("case", TWO_PROCESSES, ids=case_name)
def test_two_processes_see_the_same_rates_as_one(case: dict[str, Any]) -> None:
    flags, optimizer, total = settings_of(case)
    every_second = case["lr"][::2]
    assert rates(flags, optimizer, total, total) == pytest.approx(every_second, abs=1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if "error" in c], ids=case_name)
def test_what_cannot_be_is_one_clear_error(case: dict[str, Any]) -> None:
    flags, optimizer, total = settings_of(case)
    with pytest.raises(ValueError, match="--lr_|--lr_scheduler|Adafactor"):
        rates(flags, optimizer, total, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler": "nonsense"}, "known are constant, constant_with_warmup, linear, cosine"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "use cosine or linear"),
        ({"lr_scheduler": "cosine_warmup_with_min_lr"}, "use cosine_with_min_lr"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 3}, "use --lr_scheduler constant_with_warmup"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("power=2",)}, "linear has no argument power"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules='1:500,0.1:1000,0.01'"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=2.0",)}, "not below --learning_rate 1.0"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='up'",)}, "decay_type=up"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "needs a validation loss"),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_type StepLR refuses"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("stepsize=3",)}, "did you mean step_size"),
        ({"lr_scheduler_type": "StepLr"}, "torch.optim.lr_scheduler has no class StepLr; did you mean StepLR"),
        ({"lr_scheduler_type": "nowhere.Schedule"}, "pip install nowhere"),
        ({"lr_scheduler": "adafactor"}, "works only with --optimizer_type Adafactor"),
    ],
)
def test_an_error_says_what_works_instead(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        rates(SchedulerFlags(**settings), OptimizerFlags(optimizer_type="SGD", learning_rate=1.0), 20, 1)
    assert message in str(error.value)


def test_a_warm_up_of_the_whole_run_rises_to_its_end() -> None:
    flags = SchedulerFlags(lr_scheduler="cosine", lr_warmup_steps=int_or_float("1.0"))
    sgd = OptimizerFlags(optimizer_type="SGD", learning_rate=1.0)
    assert rates(flags, sgd, 4, 4) == [0.0, 0.25, 0.5, 0.75]


def test_a_share_of_the_run_is_rounded_down() -> None:
    flags = SchedulerFlags(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.25)
    sgd = OptimizerFlags(optimizer_type="SGD", learning_rate=1.0)
    assert rates(flags, sgd, 11, 4) == [0.0, 0.5, 1.0, 1.0]


def test_every_group_keeps_its_proportion() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (1e-3, 4e-3)]
    optimizer = make_optimizer(OptimizerFlags(learning_rate=1.0), groups)
    scheduler = make_scheduler(SchedulerFlags(lr_scheduler="linear"), optimizer, 4)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75e-3, 3e-3])


def test_a_schedule_continues_from_its_state() -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        groups = [{"params": [nn.Parameter(torch.zeros(2))]}]
        optimizer = make_optimizer(OptimizerFlags(learning_rate=1.0), groups)
        return optimizer, make_scheduler(SchedulerFlags(lr_scheduler="linear"), optimizer, 10)

    optimizer, scheduler = fresh()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    other_optimizer, other = fresh()
    other.load_state_dict(scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_optimizer.step()
    other.step()
    assert other_optimizer.param_groups[0]["lr"] == pytest.approx(0.6)


def test_a_schedule_free_optimizer_says_that_a_schedule_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    flags = SchedulerFlags(lr_scheduler="cosine")
    free = OptimizerFlags(optimizer_type="AdamWScheduleFree", learning_rate=0.5)
    assert rates(flags, free, 10, 3) == [0.5, 0.5, 0.5]
    assert "--lr_scheduler and --lr_warmup_steps have no effect" in caplog.text


def test_adafactor_with_its_own_rate_replaces_the_schedule_that_was_asked_for() -> None:
    asked = SchedulerFlags(lr_scheduler="cosine")
    choice = choose_optimizer(OptimizerFlags(optimizer_type="Adafactor"))
    assert schedule_flags(asked, choice, 1e-4).lr_scheduler == "adafactor:0.0001"
    fixed = choose_optimizer(OptimizerFlags(optimizer_type="Adafactor", optimizer_args=("relative_step=False",)))
    assert schedule_flags(asked, fixed, 1e-4) == asked


def test_adafactor_with_a_given_rate_is_advised_a_schedule(caplog: pytest.LogCaptureFixture) -> None:
    fixed = OptimizerFlags(optimizer_type="Adafactor", optimizer_args=("relative_step=False",), learning_rate=1e-3)
    assert rates(SchedulerFlags(lr_scheduler="linear"), fixed, 2, 2) == [1e-3, 5e-4]
    assert "constant_with_warmup is advised" in caplog.text
    caplog.clear()
    rates(SchedulerFlags(lr_scheduler="constant_with_warmup", lr_warmup_steps=1), fixed, 2, 1)
    assert "is advised for Adafactor" not in caplog.text


def test_the_optimizer_inside_the_wrapper_of_accelerate_counts() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups
            self.defaults = optimizer.defaults
            self.state = optimizer.state

    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))]}]
    free = make_optimizer(OptimizerFlags(optimizer_type="AdamWScheduleFree"), groups)
    assert type(make_scheduler(SchedulerFlags(), Wrapper(free), 4)).__name__ == "NoSchedule"
    own = make_optimizer(OptimizerFlags(optimizer_type="Adafactor"), groups)
    scheduler = make_scheduler(SchedulerFlags(lr_scheduler="adafactor:0.5"), Wrapper(own), 4)
    assert scheduler.get_last_lr() == [0.5]
    groups[0]["params"][0].grad = torch.ones(2, 2)
    own.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(1e-5)]
