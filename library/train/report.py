"""What a run says about itself before its first step."""

from __future__ import annotations

import logging

from accelerate import Accelerator

from library.data.dataset import TrainingSet
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.state import ParameterGroups, Plan

logger = logging.getLogger(__name__)


def report_unused_flags(settings: Settings, arch: Architecture) -> None:
    """Name in one warning every given flag that `arch` cannot honour; with --strict it is an error."""
    unused = {flag: why for flag, why in arch.unused_flags().items() if settings.given(flag)}
    if not unused:
        return
    lines = "\n".join(f"  --{flag}: {why}" for flag, why in unused.items())
    message = f"these flags have no effect on {arch.name}:\n{lines}"
    if settings[StrictFlags].strict:
        raise ValueError(message + "\nremove them, or run without --strict")
    logger.warning(message)


def log_rates(groups: ParameterGroups) -> None:
    """The learning rate and the size of every group."""
    for group, name in zip(groups.groups, groups.names, strict=True):
        rate = group.get("lr")
        count = sum(parameter.numel() for parameter in group["params"])
        logger.info("learning rate of %s: %s (%d parameters)", name, "the default" if rate is None else rate, count)


def log_plan(plan: Plan, data: TrainingSet, accelerator: Accelerator) -> None:
    """How much there is to do."""
    rows = {
        "num train images * repeats": data.num_train_images,
        "num reg images": data.num_reg_images,
        "num batches per epoch": plan.batches_per_epoch,
        "num epochs": plan.epochs,
        "batch size per device": ", ".join(str(dataset.settings.batch_size) for dataset in data.datasets),
        "gradient accumulation steps": plan.accumulation,
        "number of processes": accelerator.num_processes,
        "total optimization steps": plan.steps,
    }
    logger.info("running training\n%s", "\n".join(f"  {name}: {value}" for name, value in rows.items()))
