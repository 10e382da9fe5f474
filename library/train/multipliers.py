"""The shapes of learning rate schedules: what every rate is multiplied by as the run goes on.

`warmup` and `total` count optimizer steps; the parameters besides come from flags and --lr_scheduler_args.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Multiplier = Callable[[int], float]
"""Optimizer steps finished -> what every learning rate is multiplied by."""


def constant(warmup: int, total: int) -> Multiplier:
    """1 after the warm-up."""
    return lambda step: _warmed(step, warmup)


def linear(warmup: int, total: int) -> Multiplier:
    """From 1 to 0."""
    return lambda step: _warmed(step, warmup, lambda progress: max(0.0, 1.0 - progress), total)


def cosine(warmup: int, total: int, num_cycles: float = 0.5, min_lr_ratio: float = 0.0) -> Multiplier:
    """`num_cycles` waves of a cosine between 1 and `min_lr_ratio`; half a wave goes down once."""

    def wave(progress: float) -> float:
        return _between(min_lr_ratio, 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)))

    return lambda step: _warmed(step, warmup, wave, total)


def cosine_with_min_lr(
    warmup: int,
    total: int,
    base_rate: float,
    num_cycles: float = 0.5,
    min_lr_rate: float | None = None,
    min_lr: float | None = None,
) -> Multiplier:
    """A cosine that ends at a share `min_lr_rate` of the rate, or at the rate `min_lr`."""
    if min_lr is not None:
        min_lr_rate = min_lr / base_rate
    if min_lr_rate is None:
        raise ValueError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, such as 0.1")
    return cosine(warmup, total, num_cycles, min_lr_rate)


def cosine_with_restarts(warmup: int, total: int, num_cycles: float = 1) -> Multiplier:
    """`num_cycles` times down from 1 to 0."""

    def restart(progress: float) -> float:
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))

    return lambda step: _warmed(step, warmup, restart, total)


def polynomial(warmup: int, total: int, base_rate: float, power: float = 1.0, lr_end: float = 1e-7) -> Multiplier:
    """From the rate to `lr_end` along `(1 - progress) ** power`."""
    if lr_end >= base_rate:
        raise ValueError(f"--lr_scheduler polynomial ends at lr_end={lr_end}, not below --learning_rate {base_rate}")
    end = lr_end / base_rate

    def fall(progress: float) -> float:
        return end if progress > 1.0 else end + (1.0 - end) * (1.0 - progress) ** power

    return lambda step: _warmed(step, warmup, fall, total)


def inverse_sqrt(warmup: int, total: int, timescale: int | None = None) -> Multiplier:
    """1 / sqrt(steps), in units of `timescale` steps: the warm-up, or 10,000 without one."""
    scale = timescale or warmup or 10_000

    def factor(step: int) -> float:
        return step / warmup if step < warmup else 1.0 / math.sqrt((step + scale - warmup) / scale)

    return factor


def warmup_stable_decay(
    warmup: int,
    total: int,
    decay: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    num_cycles: float = 0.5,
    min_lr_ratio: float = 0.0,
) -> Multiplier:
    """Up over `warmup` steps, level, and down over the last `decay` steps; both ends at `min_lr_ratio`."""
    rises: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: progress,
        "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
    }
    falls: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    for key, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in rises:
            raise ValueError(f"--lr_scheduler_args: {key}={value} is not one of {', '.join(rises)}")
    start = total - decay

    def factor(step: int) -> float:
        if step < warmup:
            return _between(min_lr_ratio, rises[warmup_type](step / warmup))
        if step < start:
            return 1.0
        if step < total:
            return _between(min_lr_ratio, falls[decay_type]((step - start) / max(1, decay)))
        return min_lr_ratio

    return factor


def piecewise_constant(warmup: int, total: int, step_rules: str = "") -> Multiplier:
    """`"1:5,0.1:10,0.01"`: 1 before step 5, 0.1 before step 10, then 0.01."""
    *rules, last = str(step_rules).split(",")
    try:
        pairs = [(int(end), float(value)) for value, end in (rule.split(":") for rule in rules)]
        final = float(last)
    except ValueError as error:
        raise ValueError(
            f"--lr_scheduler piecewise_constant: step_rules={step_rules!r} is not a list of value:until ending in a "
            "value, such as --lr_scheduler_args \"step_rules='1:500,0.1:1000,0.01'\""
        ) from error

    def factor(step: int) -> float:
        return next((value for end, value in sorted(pairs) if step < end), final)

    return factor


def _warmed(step: int, warmup: int, after: Callable[[float], float] | None = None, total: int = 0) -> float:
    """Up from 0 over `warmup` steps, then `after` of the progress in the rest of the run, or 1."""
    if step < warmup:
        return step / warmup
    return 1.0 if after is None else after((step - warmup) / max(1, total - warmup))


def _between(low: float, height: float) -> float:
    """`height` in 0..1 scaled to `low`..1, never below 0."""
    return max(0.0, low + (1.0 - low) * height)
