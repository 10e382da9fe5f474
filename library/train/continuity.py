"""Where a run begins, and what makes a resumed run another one than the run that was saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.data.dataset import ImageSet, TrainingSet
from library.files.hub import download_folder
from library.flags.dreambooth import DreamBoothFlags
from library.flags.lllite import LlliteFlags
from library.flags.model import ModelFlags
from library.flags.network import NetworkFlags
from library.flags.objective import LossFlags, NoiseFlags
from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import EmaFlags, HubFlags, OutputFlags
from library.flags.run import PrecisionFlags, StepFlags
from library.flags.settings import Settings
from library.train.division import Division
from library.train.optimizer import known_name
from library.train.resume import Parts, Past, check_division, move_schedule, read_past, restore
from library.train.state import Plan, TrainState

logger = logging.getLogger(__name__)

MATTERS: tuple[type, ...] = (
    ModelFlags,
    NetworkFlags,
    LlliteFlags,
    DreamBoothFlags,
    OptimizerFlags,
    SchedulerFlags,
    StepFlags,
    PrecisionFlags,
    NoiseFlags,
    LossFlags,
    EmaFlags,
)
"""Groups whose flags change what a step does."""

DOES_NOT_MATTER = frozenset(
    [
        *("tokenizer_cache_dir", "network_weights", "dim_from_weights", "skip_until_initial_step"),
        *("initial_epoch", "initial_step", "seed", "use_safetensors"),
    ]
)
"""Flags of those groups that a resumed run does not read, or that are compared by their effect."""

CHANGES_THE_SCHEDULE = frozenset(["max_train_steps", "max_train_epochs"])
"""Flags that are raised on purpose, so that only a schedule that reads them makes it worth a word."""

MUST_AGREE = frozenset(["network_module", "optimizer_type"])
"""Flags that, changed, leave nothing that the saved numbers could be loaded into."""


def past_of(settings: Settings, division: Division | None) -> Past | None:
    """The state that --resume names, fetched from the hub with --resume_from_huggingface; None for a new run.

    `division` is how this run divides the state of its optimizer; ValueError for a state that was divided otherwise.
    """
    name = settings[OutputFlags].resume
    if not name:
        return None
    hub = settings[HubFlags]
    folder = download_folder(name, hub.huggingface_token) if hub.resume_from_huggingface else Path(name)
    past = read_past(folder)
    check_division(past, division)
    logger.info("resuming from %s: step %d, epoch %d", folder, past.position.step, past.position.epoch)
    return past


def first_position(settings: Settings, plan: Plan, past: Past | None) -> TrainState:
    """Where the run begins: --initial_step, else --initial_epoch, else where `past` stood.

    Raises ValueError when no step would be left.
    """
    flags = settings[StepFlags]
    step = flags.initial_step
    if step is None and flags.initial_epoch is not None:
        step = (flags.initial_epoch - 1) * plan.updates_per_epoch
    if step is not None:
        position = plan.position(step)
        if past is not None:
            logger.warning(
                "--initial_step and --initial_epoch win over the state: the run goes on at step %d instead of %d",
                position.step,
                past.position.step,
            )
    else:
        position = TrainState() if past is None else TrainState(**vars(past.position))
    if position.step >= plan.steps and (step is not None or (past is not None and past.finished)):
        raise ValueError(
            f"the run would begin after step {position.step}, but it has {plan.steps} steps: "
            "raise --max_train_steps or --max_train_epochs to go on"
        )
    return position


def run_facts(settings: Settings, data: TrainingSet, num_processes: int, seed: int) -> dict[str, Any]:
    """What the steps of a run depend on, as it is kept in its states: no folders, and captions only as a digest."""
    flags = {
        f.name: _plain(getattr(settings[group], f.name))
        for group in MATTERS
        if settings.takes(group)
        for f in fields(group)
        if f.name not in DOES_NOT_MATTER
    }
    flags |= {"seed": seed, "optimizer_type": known_name(settings[OptimizerFlags].optimizer_type)}
    facts = {"flags": flags, "dataset": dataset_facts(data), "processes": num_processes}
    return json.loads(json.dumps(facts))  # tuples become lists, as they do in the file


def dataset_facts(data: TrainingSet) -> dict[str, Any]:
    """Digests of what the batches depend on, one for each thing that the user may have changed."""
    sets = list(enumerate(data.datasets))

    def items(*names: str) -> str:
        return _digest(
            (number, *(getattr(item, name) for name in names)) for number, each in sets for item in each.items
        )

    return {
        "the images": _digest((number, item.path.name, item.subset) for number, each in sets for item in each.items),
        "the captions": items("caption"),
        "the repeats": items("num_repeats", "is_reg"),
        "the sizes of the training pictures": items("bucket", "resized"),
        "the batch size": [each.settings.batch_size for _, each in sets],
        "the settings of the dataset": _digest(_settings_of(each) for _, each in sets),
    }


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a run differs from the one that was saved, a line each, for a warning.

    Raises ValueError for what the saved numbers cannot be loaded into.
    """
    old, new = before["flags"], now["flags"]
    changed = {name: (old[name], new[name]) for name in old.keys() & new.keys() if old[name] != new[name]}
    wrong = [f"--{name} was {old[name]} and is {new[name]}" for name in sorted(changed.keys() & MUST_AGREE)]
    if wrong:
        raise ValueError("the saved run cannot be continued with these settings: " + "; ".join(wrong))
    lines = [f"--{name} was {was} and is {value}" for name, (was, value) in sorted(changed.items())]
    if not uses_length(new):
        lines = [line for line in lines if line.split()[0][2:] not in CHANGES_THE_SCHEDULE]
    data = before["dataset"], now["dataset"]
    lines += [f"{name} changed" for name in data[1] if data[0].get(name) != data[1][name]]
    if before["processes"] != now["processes"]:
        lines.append(f"there were {before['processes']} processes and now are {now['processes']}")
    return lines


def go_on(parts: Parts, position: TrainState, past: Past | None, facts: Mapping[str, Any]) -> None:
    """Load everything from `past`, and say in one warning what makes this run another one.

    Without a past only the schedule is moved to `position`. Raises ValueError for a network or an optimizer that the
    saved numbers do not fit.
    """
    if past is None:
        if position.step:
            move_schedule(parts.schedule, parts.optimizer, position.step)
        return
    try:
        lines = compare(past.facts, facts)
    except KeyError as error:
        raise ValueError(f"--resume {past.folder}: its record lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"--resume {past.folder}: {error}") from error
    restore(parts, past, new_arguments(past.facts, facts))
    if position.step != past.position.step:
        move_schedule(parts.schedule, parts.optimizer, position.step)
    if lines:
        logger.warning(
            "this run is not the one that was saved, so it will not end as that would have:\n%s",
            "\n".join(f"  {line}" for line in lines),
        )


def uses_length(flags: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step depends on how many steps there are in all."""
    return flags["lr_scheduler"] not in ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant")


def new_arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of --optimizer_args when these have changed: the values of today hold."""
    old, new = before["flags"]["optimizer_args"], now["flags"]["optimizer_args"]
    return [] if old == new else [pair.split("=", 1)[0] for pair in new or ()]


def _settings_of(dataset: ImageSet) -> str:
    """Everything said about a dataset but where it lies and how it is cached."""
    own = [f"{f.name}={getattr(dataset.settings, f.name)!r}" for f in fields(dataset.settings) if f.name != "subsets"]
    subsets = [
        [f"{f.name}={getattr(subset, f.name)!r}" for f in fields(subset) if not _names_a_place(f.name)]
        for subset in dataset.settings.subsets
    ]
    return repr((own, subsets))


def _names_a_place(name: str) -> bool:
    return name.endswith(("_dir", "_file", "dir", "file")) or "cache" in name


def _digest(rows: Iterable[Any]) -> str:
    digest = blake2b(digest_size=12)
    for row in rows:
        digest.update(repr(row).encode("utf-8"))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """`value` for a JSON file that others may see: of a path its last part."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return Path(value).name
    return value
