"""When files are saved, what they are called, and which are deleted again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from library.flags.output import OutputFlags

logger = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes weights that were taken earlier to a path, whole or not at all (`library.files.atomic`)."""


class Saver:
    """Writes checkpoints one after another in a thread of its own, while training goes on.

    The weights are taken before `save_*` is called, so a file holds what a save on the spot would have held. What
    goes wrong in the thread is raised by the next `save_*`, or by `join`. An old file is deleted only once the new
    one lies on the disk whole. Only the main process saves.
    """

    def __init__(self, flags: OutputFlags, num_epochs: int, is_main_process: bool) -> None:
        if flags.output_dir is None:
            raise ValueError("--output_dir is needed: the folder that results are saved to")
        self.flags = flags
        self.every_epochs = epochs_between_saves(flags, num_epochs)
        self.num_epochs = num_epochs
        self.is_main_process = is_main_process
        self.directory = Path(flags.output_dir)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._running: Future[None] | None = None

    def due_at_step(self, step: int) -> bool:
        """Whether a file is wanted after optimizer step `step`, 1 for the first."""
        every = self.flags.save_every_n_steps
        return self.is_main_process and every is not None and step % every == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether a file is wanted after `epoch`, 1 for the first; the last epoch's is the last file."""
        every = self.every_epochs
        return self.is_main_process and every is not None and epoch % every == 0 and epoch < self.num_epochs

    def save_step(self, write: Writer, step: int) -> None:
        """Save `..-step00000100`, and delete the file that has left the last --save_last_n_steps steps."""
        every, keep = self.flags.save_every_n_steps, self.flags.save_last_n_steps
        old = None
        if every is not None and keep is not None:
            # A file of step x stays while x is among the last `keep` steps: x > step - keep.
            expired = (step - keep) // every * every
            old = self.path(step_name(self.flags, expired)) if expired > 0 else None
        self._save(write, self.path(step_name(self.flags, step)), old)

    def save_epoch(self, write: Writer, epoch: int) -> None:
        """Save `..-000005`, and delete the oldest of more than --save_last_n_epochs files."""
        every, keep = self.every_epochs, self.flags.save_last_n_epochs
        old = None
        if every is not None and keep is not None:
            expired = epoch - every * keep
            old = self.path(epoch_name(self.flags, expired)) if expired > 0 else None
        self._save(write, self.path(epoch_name(self.flags, epoch)), old)

    def save_last(self, write: Writer) -> None:
        """Save the result of the run."""
        if self.is_main_process:
            self._save(write, self.path(last_name(self.flags)), None)

    def path(self, stem: str) -> Path:
        """Where the checkpoint called `stem` lies."""
        return self.directory / f"{stem}.{self.flags.save_model_as or 'safetensors'}"

    def join(self) -> None:
        """Wait until everything is on the disk; raises what went wrong there."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _save(self, write: Writer, path: Path, old: Path | None) -> None:
        self.join()
        logger.info("saving checkpoint: %s", path)
        self._running = self._thread.submit(_write, write, path, old)


def epochs_between_saves(flags: OutputFlags, num_epochs: int) -> int | None:
    """Every how many epochs a file is wanted; --save_n_epoch_ratio spreads that many over the run."""
    if flags.save_n_epoch_ratio:
        return max(1, num_epochs // flags.save_n_epoch_ratio)
    return flags.save_every_n_epochs


def step_name(flags: OutputFlags, step: int) -> str:
    """The name, without extension, of what is saved after `step`."""
    return f"{flags.output_name or 'at'}-step{step:08d}"


def epoch_name(flags: OutputFlags, epoch: int) -> str:
    """The name, without extension, of what is saved after `epoch`."""
    return f"{flags.output_name or 'epoch'}-{epoch:06d}"


def last_name(flags: OutputFlags) -> str:
    """The name, without extension, of the result."""
    return flags.output_name or "last"


def snapshot(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of `tensors` in main memory, in `dtype`, that training does not change any more.

    On a GPU all copies are started before the first is waited for, and the device is waited for once.
    """
    copies: dict[str, Tensor] = {}
    devices = set()
    for name, tensor in tensors.items():
        source = tensor.detach()
        target = source.dtype if dtype is None or not source.is_floating_point() else dtype
        on_gpu = source.device.type == "cuda"
        copy = torch.empty(source.shape, dtype=target, device="cpu", pin_memory=on_gpu)
        # Cast on the device first: a copy that also casts is staged through a second buffer there.
        copies[name] = copy.copy_(source.to(target) if on_gpu else source, non_blocking=on_gpu)
        if on_gpu:
            devices.add(source.device)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


def _write(write: Writer, path: Path, old: Path | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except Exception as error:
        # Said at once: when training itself fails before the next save, nobody asks for the result any more.
        logger.error("%s could not be saved: %s", path, error)
        raise
    if old is not None and old != path and old.exists():
        logger.info("removing old checkpoint: %s", old)
        old.unlink()
