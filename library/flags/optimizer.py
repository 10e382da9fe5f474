"""Which optimizer moves the weights, how fast, and how the rate changes."""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from library.flags.declare import flag


def int_or_float(text: str) -> int | float:
    """`100` -> 100 steps; `0.1`, `10%` and `1.0` -> a part of the run, as a float."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        number = float(text)
        if number < 1 or text == "1.0":
            return number
        return int(text)
    except ValueError:
        raise ArgumentTypeError(
            f"expected whole steps (100), a part of the run below 1 (0.1) or a percentage (10%), got {text!r}"
        ) from None


def steps_or_part(value: int | float) -> int | float:
    """Steps of the run, or a float between 0 and 1: a part of it."""
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"expected steps, or a part of the run between 0 and 1 (0% and 100%), got {value}")
    return value


def pairs(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Arguments of the form key=value."""
    for value in values or ():
        if not value.partition("=")[0].strip() or "=" not in value:
            raise ValueError(f"expected key=value, got {value!r}")
    return values


@dataclass(frozen=True)
class OptimizerFlags:
    """Optimizer"""

    optimizer_type: str = flag("", "name in any case (AdamW unless given), or module.Class")
    learning_rate: float = flag(2.0e-6, "learning rate where no other is given", at_least=0)
    max_grad_norm: float = flag(1.0, "longest gradient over all trained weights; 0 does not clip", at_least=0)
    optimizer_args: tuple[str, ...] | None = flag(
        None, "key=value, values as Python literals: weight_decay=0.01 betas=0.9,0.999", parse=pairs
    )
    fused_backward_pass: bool = flag(
        False, "update each weight during backward and forget its gradient: less memory; with Adafactor"
    )
    unet_lr: float | None = flag(None, "learning rate of the U-Net's part", at_least=0)
    text_encoder_lr: tuple[float, ...] | None = flag(
        None, "learning rate of the text encoders' part: one, or one per encoder", at_least=0
    )


@dataclass(frozen=True)
class SchedulerFlags:
    """Learning rate schedule"""

    lr_scheduler_type: str = flag(
        "", "scheduler class of torch.optim.lr_scheduler, or module.Class; replaces lr_scheduler"
    )
    lr_scheduler_args: tuple[str, ...] | None = flag(
        None, "key=value for the scheduler, values as Python literals", parse=pairs
    )
    lr_scheduler: str = flag(
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, "
        "cosine_with_min_lr, warmup_stable_decay, piecewise_constant or adafactor",
    )
    lr_warmup_steps: int | float = flag(
        0,
        "rising rate at the start: steps, a part of the run (0.1, 10%; 1.0 is the whole run)",
        type=int_or_float,
        parse=steps_or_part,
    )
    lr_decay_steps: int | float = flag(
        0,
        "falling rate at the end of warmup_stable_decay, given like lr_warmup_steps",
        type=int_or_float,
        parse=steps_or_part,
    )
    lr_scheduler_num_cycles: int = flag(1, "restarts of cosine_with_restarts", at_least=0)
    lr_scheduler_power: float = flag(1, "exponent of polynomial")
    lr_scheduler_timescale: int | None = flag(None, "timescale of inverse_sqrt in steps", at_least=0)
    lr_scheduler_min_lr_ratio: float | None = flag(
        None, "lowest rate as a part of the learning rate, cosine_with_min_lr and warmup_stable_decay", at_least=0
    )
