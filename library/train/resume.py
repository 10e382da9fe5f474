"""What a state folder holds, how it is written and how a run continues from one."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.files.atomic import replacing_folder
from library.files.weights import describe_keys, open_weights
from library.train.division import Division, described, file_names
from library.train.ema import MovingWeights
from library.train.saving import Writer, snapshot
from library.train.scheduler import Schedule
from library.train.state import TrainState
from library.train.validation import Validation

logger = logging.getLogger(__name__)

RECORD, WEIGHTS, OPTIMIZER, SCHEDULE = "train_state.json", "model.safetensors", "optimizer.bin", "scheduler.bin"
SCALER, AVERAGE = "scaler.pt", "ema.safetensors"
FORMAT = 1
"""Raised when an older state can no longer be read."""


@dataclass(frozen=True)
class Past:
    """What a state folder says about the run it was saved by, before anything is loaded from it."""

    folder: Path
    position: TrainState
    seed: int
    finished: bool
    """Whether the run had come to its end."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run depended on, see `library.train.continuity`."""
    validation: Mapping[str, Any] | None = None
    """The lowest validation loss so far."""
    divided_by: str | None = None
    """As `Division.way`; None for an optimizer whose state is in one file."""
    ranks: int = 1
    """The processes that it was divided among."""


@dataclass(frozen=True)
class Parts:
    """Everything of a run that its steps change."""

    modules: Sequence[nn.Module]
    """What is trained."""
    optimizer: Optimizer
    schedule: Schedule
    scaler: GradScaler | None = None
    average: MovingWeights | None = None
    validation: Validation | None = None
    division: Division | None = None
    """Of the optimizer's state, if other ranks have parts of it."""


def read_past(folder: str | Path) -> Past:
    """What `folder` says; ValueError names --resume and what is wrong with it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--resume {folder}: there is no such folder; give a folder whose name ends in -state")
    _check_files(folder, RECORD, WEIGHTS)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            raise ValueError(
                "it was written by another program or version; start a new run with --network_weights "
                f"{folder / WEIGHTS} and --initial_step {record.get('current_step', 'N')}"
            )
        position = TrainState(**{f.name: int(record["position"][f.name]) for f in fields(TrainState)})
        divided = record.get("divided") or {"by": None, "ranks": 1}
        known = (int(record["seed"]), bool(record["finished"]), record["facts"], record.get("validation"))
        past = Past(folder, position, *known, divided["by"], int(divided["ranks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume {folder}: {RECORD} cannot be used: {error}") from error
    _check_files(folder, *([OPTIMIZER] if past.divided_by is None else file_names(past.ranks)))
    return past


def check_division(past: Past, division: Division | None) -> None:
    """Raise ValueError when the state of the optimizer was divided in another way than that of this run is."""
    now = (None, 1) if division is None else (division.way, division.ranks)
    if (past.divided_by, past.ranks) != now:
        raise ValueError(
            f"--resume {past.folder}: the state of its optimizer is {described(past.divided_by, past.ranks)}, and that "
            f"of this run is {described(*now)}: resume it as it was saved, or begin a new run from the weights that "
            "were saved with it"
        )


def state_writer(parts: Parts, position: TrainState, seed: int, facts: Mapping[str, Any], finished: bool) -> Writer:
    """Take everything as it is now; the answer writes it to a folder, in a thread of its own.

    Where the optimizer's state is divided all ranks call this, and the answer of the first one writes every part.
    """
    optimizer, division = _taken(_inner(parts.optimizer).state_dict()), parts.division
    divided = {} if division is None else division.gather(optimizer)
    if division is not None and division.rank > 0:
        return lambda path: None
    record = {
        "current_epoch": position.epoch,
        "current_step": position.step,
        "format": FORMAT,
        "position": asdict(position),
        "seed": seed,
        "finished": finished,
        "divided": None if division is None else {"by": division.way, "ranks": division.ranks},
        "facts": dict(facts),
        "validation": None if parts.validation is None else parts.validation.state_dict(),
    }
    weights = snapshot(trained_tensors(parts.modules), None)
    average = None if parts.average is None else snapshot(parts.average.state(), None)
    pickled = {SCHEDULE: _taken(parts.schedule.state_dict())}
    if division is None:
        pickled[OPTIMIZER] = optimizer
    if parts.scaler is not None:
        pickled[SCALER] = _taken(parts.scaler.state_dict())

    def write(path: Path) -> None:
        with replacing_folder(path) as folder:
            save_file(weights, folder / WEIGHTS)
            if average is not None:
                save_file(average, folder / AVERAGE)
            for name, content in pickled.items():
                if content:
                    torch.save(content, folder / name)
            for name, part in divided.items():
                part.numpy().tofile(folder / name)
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    return write


def restore(parts: Parts, past: Past, new_arguments: Collection[str] = ()) -> None:
    """Put everything back as `past` says it was.

    Rates, the schedule and the `new_arguments` of the optimizer are those of the settings of today; where these are
    the same as before, so is every number.

    Raises:
        ValueError: the network or the optimizer is another one; names the folder.
    """
    try:
        _restore_weights(parts.modules, past.folder / WEIGHTS)
        file = OPTIMIZER if parts.division is None else parts.division.file
        rates = _restore_optimizer(_inner(parts.optimizer), _unpickled(past.folder / file), new_arguments)
        if (past.folder / SCHEDULE).is_file():
            _restore_schedule(parts.schedule, _inner(parts.optimizer), _unpickled(past.folder / SCHEDULE), rates)
        if parts.scaler is not None and (past.folder / SCALER).is_file():
            parts.scaler.load_state_dict(_unpickled(past.folder / SCALER))
        if parts.validation is not None and past.validation is not None:
            parts.validation.load_state_dict(past.validation)
        if parts.average is not None and (past.folder / AVERAGE).is_file():
            parts.average.load_state(load_file(past.folder / AVERAGE))
        elif parts.average is not None:
            logger.warning("%s holds no moving average: it begins anew with the weights of now", past.folder)
            parts.average.restart()
    except ValueError as error:
        raise ValueError(f"--resume {past.folder}: {error}") from error


def trained_tensors(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of what is trained; the names of several modules begin with their number."""
    prefixes = [""] if len(modules) == 1 else [f"{number}." for number in range(len(modules))]
    return {
        prefix + name: tensor.detach()
        for prefix, module in zip(prefixes, modules, strict=True)
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }


def move_schedule(schedule: Schedule, optimizer: Optimizer, step: int) -> None:
    """Let a schedule that is a function of the step stand after `step` of them; others stay where they are."""
    if not isinstance(schedule, LambdaLR):
        if step and schedule.state_dict():
            logger.warning("%s cannot begin at step %d: it begins anew", type(schedule).__name__, step)
        return
    schedule.last_epoch, schedule._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(_inner(optimizer).param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _check_files(folder: Path, *names: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--resume {folder} is not a complete state: {', '.join(missing)} is missing")


def _restore_weights(modules: Sequence[nn.Module], path: Path) -> None:
    """In place, since parameters are views into a flat buffer."""
    wanted = trained_tensors(modules)
    with open_weights(path) as file:
        saved = {key: file.shape(key) for key in file.keys()}
        wrong = [key for key, tensor in wanted.items() if saved.get(key) != tuple(tensor.shape)]
        if wrong or saved.keys() - wanted.keys():
            odd = wrong + sorted(saved.keys() - wanted.keys())
            raise ValueError(
                f"the state is of a network of another shape, or of other parts of the model ({describe_keys(odd)}); "
                "--network_module, --network_dim, --network_args, --stop_text_encoder_training and all else that says "
                "what is trained must be those of the run that saved it"
            )
        for key, tensor in wanted.items():
            tensor.copy_(file.read(key))


def _restore_optimizer(optimizer: Optimizer, saved: Any, new_arguments: Collection[str]) -> list[float | None]:
    """The state of `saved` with the rates of today; the answer is by how much each group's rate has changed.

    torch casts what it loads to the dtype of the parameter, which an optimizer need not have done.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if saved_sizes != sizes:
        raise ValueError(
            f"the saved optimizer has groups of {_listed(saved_sizes)} tensors, and that of this run of "
            f"{_listed(sizes)}: --deepspeed, --fused_backward_pass, --unet_lr, --text_encoder_lr and all else that "
            "says what is trained and how must be those of the run that saved it"
        )
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    bases = [group.get("initial_lr", group["lr"]) for group in saved["param_groups"]]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the optimizer's state does not fit {type(optimizer).__name__}: {error}") from error
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
    ratios = []
    for group, before, base in zip(optimizer.param_groups, fresh, bases, strict=True):
        rate = before.get("initial_lr", before["lr"])
        ratios.append(None if rate == base or not base else float(rate) / float(base))
        group.update({key: before[key] for key in new_arguments if key in before})
        if ratios[-1] is not None:
            group["lr"] = group["lr"] * ratios[-1]
            group["initial_lr"] = rate
    return ratios


def _restore_schedule(schedule: Schedule, optimizer: Optimizer, saved: Any, ratios: Sequence[float | None]) -> None:
    """Where the saved schedule stood; one that is a function of the step is asked again, so that it may be new."""
    if isinstance(schedule, LambdaLR):
        move_schedule(schedule, optimizer, saved["last_epoch"])
        return
    try:
        schedule.load_state_dict(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the saved schedule does not fit {type(schedule).__name__}: {error}") from error
    bases = getattr(schedule, "base_lrs", None)
    if bases is not None:
        bases[:] = [base * (ratio or 1.0) for base, ratio in zip(bases, ratios, strict=True)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _taken(value: Any) -> Any:
    """`value` with copies of its tensors in main memory, as deep as dictionaries and lists go."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _taken(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts: Iterable[Any] = (_taken(part) for part in value)
        return list(parts) if isinstance(value, list) else tuple(parts)
    return value


def _unpickled(path: Path) -> Any:
    """The content of `path`, read without running code that may lie in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} holds more than numbers, which is not loaded since it could run code: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path.name} is cut short or damaged; go on from another state") from error
