"""How much of the disk the files and states of a run will take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from library.flags.optimizer import OptimizerFlags
from library.flags.output import EmaFlags, OutputFlags
from library.flags.settings import Settings
from library.train.accelerator import save_dtype
from library.train.memory_estimate import optimizer_bytes
from library.train.run_sheet import gigabytes
from library.train.saving import epochs_between_saves
from library.train.state import ParameterGroups, Plan


@dataclass(frozen=True)
class Kept:
    """Things of one kind that a run writes; old ones may be deleted again."""

    written: int
    stay: int
    size: int
    """Bytes of each."""

    @property
    def at_most(self) -> int:
        """Bytes that are taken at once: an old one is deleted when the new one is written."""
        return min(self.written, self.stay + 1) * self.size

    def text(self) -> str:
        """How many there will be, and what they take in the end."""
        if not self.written:
            return "none"
        stay = f"; {self.stay} of them stay" if self.stay < self.written else ""
        return f"{self.written}, {gigabytes(self.size)} each{stay}; {gigabytes(self.stay * self.size)} of disk"


@dataclass(frozen=True)
class DiskEstimate:
    """All that a run writes but for logs and previews, which are small."""

    files: Kept
    """Of weights: the best by validation and the moving averages too."""
    states: Kept

    @property
    def at_most(self) -> int:
        """Bytes that must be free."""
        return self.files.at_most + self.states.at_most

    def rows(self, output: OutputFlags) -> list[tuple[str, str]]:
        """For the plan of the run."""
        free = f"{gigabytes(free_disk(output))} free"
        return [
            ("files that will be written", f"{self.files.text()}, {free}"),
            ("states that will be written", self.states.text()),
        ]


def estimate_disk(
    settings: Settings, plan: Plan, groups: ParameterGroups, *, validates: bool, file_size: int | None = None
) -> DiskEstimate:
    """What a run that trains `groups` leaves; one that `validates` keeps its best file too.

    `file_size` is that of files which hold more than what is trained, in bytes.
    """
    output, averages = settings[OutputFlags], settings[EmaFlags].ema_decay is not None
    size = file_bytes(output, groups) if file_size is None else file_size
    return DiskEstimate(
        files=kept_files(output, plan, size, averages=averages, validates=validates),
        states=kept_states(output, plan, state_bytes(settings, groups)),
    )


def kept_files(output: OutputFlags, plan: Plan, size: int, *, averages: bool, validates: bool) -> Kept:
    """The files of weights; with `averages` each has its `-ema` beside it."""
    by_step, steps_stay = _saves_by_step(output, plan, output.save_last_n_steps)
    by_epoch, epochs_stay = _saves_by_epoch(output, plan, output.save_last_n_epochs)
    each, last = (2 if averages else 1), (2 if validates else 1)
    return Kept(each * (by_step + by_epoch + last), each * (steps_stay + epochs_stay + last), size)


def file_bytes(output: OutputFlags, groups: ParameterGroups) -> int:
    """One file of weights."""
    parameters = [parameter for group in groups.groups for parameter in group["params"]]
    saved = save_dtype(output.save_precision)
    return sum(p.numel() * (p.dtype if saved is None else saved).itemsize for p in parameters)


def kept_states(output: OutputFlags, plan: Plan, size: int) -> Kept:
    """The states of --save_state, or the one of --save_state_on_train_end."""
    if not output.save_state:
        last = int(output.save_state_on_train_end)
        return Kept(last, last, size)
    by_step, steps_stay = _saves_by_step(output, plan, output.save_last_n_steps_state or output.save_last_n_steps)
    by_epoch, epochs_stay = _saves_by_epoch(output, plan, output.save_last_n_epochs_state or output.save_last_n_epochs)
    return Kept(by_step + by_epoch + 1, steps_stay + epochs_stay + 1, size)


def state_bytes(settings: Settings, groups: ParameterGroups) -> int:
    """One state: the weights as they are trained, their moving average, and what the optimizer remembers."""
    output = settings[OutputFlags]
    if not (output.save_state or output.save_state_on_train_end):
        return 0
    parameters = [parameter for group in groups.groups for parameter in group["params"]]
    weights, count = sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters)
    averages = weights if settings[EmaFlags].ema_decay is not None else 0
    return weights + averages + int(count * optimizer_bytes(settings[OptimizerFlags]))


def free_disk(output: OutputFlags) -> int:
    """Free bytes where the results go, whether or not the folder is there already."""
    folder = Path(output.output_dir or ".").absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _saves_by_step(output: OutputFlags, plan: Plan, last: int | None) -> tuple[int, int]:
    """How often something is saved by --save_every_n_steps, and how much stays of what is `last` steps old at most."""
    if not output.save_every_n_steps:
        return 0, 0
    count = plan.steps // output.save_every_n_steps
    return count, count if last is None else min(count, -(-last // output.save_every_n_steps))


def _saves_by_epoch(output: OutputFlags, plan: Plan, last: int | None) -> tuple[int, int]:
    """The same by epochs, of which the `last` stay; the last epoch's is the last file."""
    every = epochs_between_saves(output, plan.epochs)
    count = (plan.epochs - 1) // every if every else 0
    return count, count if last is None else min(count, last)
