"""What a run says about itself before its first step, on the console and for the report page."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from library.data.dataset import TrainingSet
from library.flags.optimizer import OptimizerFlags
from library.flags.output import OutputFlags
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.disk_estimate import estimate_disk, free_disk
from library.train.preview import Previews
from library.train.report_page import PageFacts
from library.train.run_sheet import (
    bucket_table,
    caption_table,
    gigabytes,
    group_table,
    plan_table,
    settings_tables,
    settings_text,
)
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


def announce(
    settings: Settings,
    arch: Architecture,
    data: TrainingSet,
    plan: Plan,
    groups: ParameterGroups,
    previews: Previews,
    *,
    file_size: int | None = None,
    num_processes: int,
    seed: int,
    warnings: Sequence[str] = (),
    first_step: int,
) -> PageFacts:
    """Log the settings in force, what is trained, some captions and the plan; the page gets the same tables.

    `file_size` is that of files which hold more than what is trained, in bytes. A run that continues has done
    `first_step` steps already.

    A disk that is too full for the files to come is a warning.
    """
    output = settings[OutputFlags]
    disk = estimate_disk(settings, plan, groups, validates=data.validation is not None, file_size=file_size)
    trained = group_table(groups, settings[OptimizerFlags])
    captions = caption_table(data, arch, plan.steps, seed)
    steps = plan_table(plan, data, num_processes, previews, disk.rows(output))
    logger.info("%s", settings_text(settings))
    for table in (trained, *([captions] if captions.rows else []), steps):
        logger.info("%s", table.text())
    free = free_disk(output)
    if disk.at_most > free:
        logger.warning(
            "the files of this run need %s in --output_dir %s, where %s are free: make room, or save less often "
            "(--save_every_n_epochs, --save_last_n_epochs, --save_precision=fp16, --save_state_on_train_end)",
            gigabytes(disk.at_most),
            output.output_dir,
            gigabytes(free),
        )
    return PageFacts(
        name=output.output_name or "last",
        steps=plan.steps,
        epochs=plan.epochs,
        first_step=first_step,
        settings=settings_tables(settings),
        tables=[steps, trained, *([captions] if captions.rows else [])],
        buckets=bucket_table(data),
        warnings=warnings,
    )
