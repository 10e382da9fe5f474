"""How the learning rate changes over the run: --lr_scheduler, its flags, and classes named by --lr_scheduler_type."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from library.flags.optimizer import SchedulerFlags
from library.train.multipliers import (
    Multiplier,
    constant,
    cosine,
    cosine_with_min_lr,
    cosine_with_restarts,
    inverse_sqrt,
    linear,
    piecewise_constant,
    polynomial,
    warmup_stable_decay,
)
from library.train.optimizer import OptimizerChoice, check_arguments, import_class, parse_arguments

logger = logging.getLogger(__name__)


class Schedule(Protocol):
    """What the trainer asks of a schedule; one `step()` after every optimizer step, on every rank."""

    def step(self) -> None:
        """Set the rates of the next optimizer step."""
        ...

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in use, one per parameter group."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


class NoSchedule:
    """The schedule of an optimizer that needs none: the rates stay as they are."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Do nothing."""

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in use, one per parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class ReportedRate(LRScheduler):
    """Adafactor's own rate, for the log: `initial_lr` until the first step, then what each group used."""

    def __init__(self, optimizer: Optimizer, initial_lr: float) -> None:
        self.initial_lr = initial_lr
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", initial_lr)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """One rate per parameter group."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        state = self.optimizer.state.get(group["params"][0], {})
        if "RMS" not in state:
            return self.initial_lr
        adafactor: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        return float(adafactor._get_lr(group, state))


def schedule_flags(flags: SchedulerFlags, choice: OptimizerChoice, learning_rate: float | None) -> SchedulerFlags:
    """`flags` as they hold once the optimizer has had its word: Adafactor with relative_step only reports."""
    if not choice.sets_its_own_rate:
        return flags
    return replace(flags, lr_scheduler=f"adafactor:{learning_rate}")


def make_scheduler(flags: SchedulerFlags, optimizer: Optimizer, max_train_steps: int) -> Schedule:
    """The schedule that `flags` name, counted in optimizer steps whatever the number of processes.

    Raises ValueError for an unknown name or argument, and for warm-up where it would have no effect.
    """
    # accelerate's wrapper counts as the optimizer that is stepped, but the kind is that of the one inside.
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if "ScheduleFree" in kind:
        if flags.lr_scheduler != "constant" or flags.lr_scheduler_type or flags.lr_warmup_steps:
            logger.warning(
                "%s needs no schedule: --lr_scheduler and --lr_warmup_steps have no effect; "
                "warm up with --optimizer_args warmup_steps=N",
                kind,
            )
        return NoSchedule(optimizer)
    relative = any(group.get("relative_step") for group in optimizer.param_groups)
    if relative or flags.lr_scheduler.startswith("adafactor"):
        return _adafactor_schedule(flags, optimizer, relative)
    if kind == "Adafactor" and (flags.lr_scheduler_type or flags.lr_scheduler != "constant_with_warmup"):
        logger.warning("--lr_scheduler constant_with_warmup is advised for Adafactor with a given learning rate")
    arguments = parse_arguments(flags.lr_scheduler_args, "--lr_scheduler_args")
    if flags.lr_scheduler_type:
        return _custom_schedule(flags, optimizer, arguments)
    return LambdaLR(optimizer, multiplier(flags, arguments, max_train_steps, optimizer.defaults["lr"]))


def multiplier(flags: SchedulerFlags, arguments: Mapping[str, Any], total: int, base_rate: float) -> Multiplier:
    """The factor of every optimizer step for one of the names in `SCHEDULES`."""
    name = flags.lr_scheduler
    if name in NOT_SCHEDULES:
        raise ValueError(f"--lr_scheduler {name} {NOT_SCHEDULES[name]}")
    if name not in SCHEDULES:
        raise ValueError(f"--lr_scheduler {name} is not known; known are {', '.join(SCHEDULES)}")
    warmup = steps_of(flags.lr_warmup_steps, total)
    if name in WITHOUT_WARMUP and warmup:
        raise ValueError(
            f"--lr_scheduler {name} has no warm-up, but --lr_warmup_steps is {flags.lr_warmup_steps}: "
            "use --lr_scheduler constant_with_warmup, or leave --lr_warmup_steps out"
        )
    make, settings_of = SCHEDULES[name]
    given = {key: value for key, value in settings_of(flags, base_rate, total).items() if value is not None}
    accepted = [key for key in inspect.signature(make).parameters if key not in FROM_FLAGS]
    for key in arguments:
        if key not in accepted:
            takes = ", ".join(accepted) or "no arguments"
            raise ValueError(f"--lr_scheduler_args: {name} has no argument {key}; it takes {takes}")
    return make(warmup, total, **(given | dict(arguments)))


def steps_of(value: int | float, total: int) -> int:
    """A number of optimizer steps: an int as it is, a float as that share of `total`."""
    return value if isinstance(value, int) else int(value * total)


SCHEDULES: Mapping[str, tuple[Callable[..., Multiplier], Callable[[SchedulerFlags, float, int], dict[str, Any]]]] = {
    "constant": (constant, lambda flags, rate, total: {}),
    "constant_with_warmup": (constant, lambda flags, rate, total: {}),
    "linear": (linear, lambda flags, rate, total: {}),
    "cosine": (cosine, lambda flags, rate, total: {}),
    "cosine_with_restarts": (
        cosine_with_restarts,
        lambda flags, rate, total: {"num_cycles": flags.lr_scheduler_num_cycles},
    ),
    "polynomial": (polynomial, lambda flags, rate, total: {"base_rate": rate, "power": flags.lr_scheduler_power}),
    "inverse_sqrt": (inverse_sqrt, lambda flags, rate, total: {"timescale": flags.lr_scheduler_timescale}),
    "cosine_with_min_lr": (
        cosine_with_min_lr,
        lambda flags, rate, total: {
            "base_rate": rate,
            "num_cycles": flags.lr_scheduler_num_cycles / 2,
            "min_lr_rate": flags.lr_scheduler_min_lr_ratio,
        },
    ),
    "warmup_stable_decay": (
        warmup_stable_decay,
        lambda flags, rate, total: {
            "decay": steps_of(flags.lr_decay_steps, total),
            "num_cycles": flags.lr_scheduler_num_cycles / 2,
            "min_lr_ratio": flags.lr_scheduler_min_lr_ratio,
        },
    ),
    "piecewise_constant": (piecewise_constant, lambda flags, rate, total: {}),
}
"""Name -> the multiplier's maker and what the flags say to it; --lr_scheduler_args comes on top."""

FROM_FLAGS = frozenset(["warmup", "total", "decay", "base_rate"])
WITHOUT_WARMUP = frozenset(["constant", "piecewise_constant"])

NOT_SCHEDULES: Mapping[str, str] = {
    "reduce_lr_on_plateau": "needs a validation loss at every step and is not available; use cosine or linear",
    "cosine_warmup_with_min_lr": "is not available; use cosine_with_min_lr, which has --lr_warmup_steps too",
    "greedy": "needs a loss at every step and is not available; use cosine or linear",
}


def _adafactor_schedule(flags: SchedulerFlags, optimizer: Optimizer, relative: bool) -> Schedule:
    """Adafactor's own schedule; any other that was asked for is named as having no effect."""
    if not relative:
        raise ValueError(
            "--lr_scheduler adafactor works only with --optimizer_type Adafactor and relative_step=True; "
            "use constant_with_warmup"
        )
    if flags.lr_warmup_steps:
        raise ValueError("Adafactor with relative_step has no --lr_warmup_steps; use --optimizer_args warmup_init=True")
    if flags.lr_scheduler != "constant" and not flags.lr_scheduler.startswith("adafactor"):
        logger.warning("--lr_scheduler %s has no effect: Adafactor with relative_step sets its own rate; "
                       "give --optimizer_args relative_step=False to use it", flags.lr_scheduler)  # fmt: skip
    _, _, initial = flags.lr_scheduler.partition(":")
    try:
        return ReportedRate(optimizer, float(initial) if initial else 0.0)
    except ValueError as error:
        raise ValueError(f"--lr_scheduler adafactor:{initial}: what follows the colon must be a number") from error


def custom_class(flags: SchedulerFlags) -> Any:
    """The class that --lr_scheduler_type names; None if nothing is named."""
    name = flags.lr_scheduler_type
    if not name:
        return None
    if flags.lr_warmup_steps:
        raise ValueError(f"--lr_scheduler_type {name} does not know --lr_warmup_steps; leave it out")
    found = import_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", "--lr_scheduler_type")
    if found is ReduceLROnPlateau:
        raise ValueError(f"--lr_scheduler_type {name} {NOT_SCHEDULES['reduce_lr_on_plateau']}")
    return found


def _custom_schedule(flags: SchedulerFlags, optimizer: Optimizer, arguments: Mapping[str, Any]) -> Schedule:
    """A class of torch.optim.lr_scheduler or at a dotted path, given --lr_scheduler_args."""
    name, schedule_class = flags.lr_scheduler_type, custom_class(flags)
    check_arguments(schedule_class, arguments, "--lr_scheduler_args", reserved={"optimizer"})
    try:
        return schedule_class(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        given = " ".join(flags.lr_scheduler_args or ())
        raise ValueError(f"--lr_scheduler_type {name} refuses --lr_scheduler_args {given}: {error}") from error
