"""When files and states are saved, what they are called, and which are deleted again."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from library.files.atomic import remove, remove_leftovers
from library.files.hub import HubPlace, Uploads
from library.flags.output import HubFlags, OutputFlags
from library.flags.settings import Settings

logger = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes weights that were taken earlier to a path, whole or not at all (`library.files.atomic`)."""

Check = Callable[[Path], None]
"""Reopens a written file; ValueError when other programs could not use it."""

_MAKE_ROOM = (
    ": make room, keep fewer files (--save_last_n_steps, --save_last_n_epochs), or smaller ones (--save_precision=fp16)"
)
CURES: Mapping[int, str] = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: ": files of this size are not allowed there; choose another --output_dir, or --save_precision=fp16",
    errno.EIO: _MAKE_ROOM,
    errno.EACCES: ": --output_dir must be a folder that may be written to",
    errno.EROFS: ": --output_dir must be a folder that may be written to",
}
"""What to do about an error of the system while saving."""

STATE = "-state"
"""How the name of a state folder ends."""


class Saver:
    """Writes checkpoints one after another in a thread of its own, while training goes on.

    The weights are taken before `save_*` is called, so a file holds what a save on the spot would have held. What
    goes wrong in the thread is raised by the next `save_*`, by `check` or by `join`. An old file is deleted only once
    the new one lies on the disk whole. Only the main process saves, and removes what runs that were killed began.

    One save may be several files: `writers` maps what is put behind the name to what is written, such as "" for the
    network and "-ema" for its moving average.
    """

    def __init__(
        self,
        flags: OutputFlags,
        num_epochs: int,
        is_main_process: bool,
        check_file: Check | None = None,
        uploads: Uploads | None = None,
        upload_states: bool = False,
    ) -> None:
        if flags.output_dir is None:
            raise ValueError("--output_dir is needed: the folder that results are saved to")
        self.flags = flags
        self.every_epochs = epochs_between_saves(flags, num_epochs)
        self.num_epochs = num_epochs
        self.is_main_process = is_main_process
        self.directory = Path(flags.output_dir)
        self.check_file = check_file
        self.uploads = uploads
        self.upload_states = upload_states
        self.handed_over: list[str] = []
        """Names of files and states whose saving began since `Progress.log_saves` asked."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._running: deque[Future[None]] = deque()
        if is_main_process and self.directory.is_dir():
            remove_leftovers([self.directory])

    def due_at_step(self, step: int, asked: object = None) -> bool:
        """Whether a file is wanted after optimizer step `step`, 1 for the first, or was `asked` for."""
        every = self.flags.save_every_n_steps
        return bool(asked) or (every is not None and step % every == 0)

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether a file is wanted after `epoch`, 1 for the first; the last epoch's is the last file."""
        every = self.every_epochs
        return every is not None and epoch % every == 0 and epoch < self.num_epochs

    def save_step(self, writers: Mapping[str, Writer], step: int) -> None:
        """Save `..-step00000100`, and delete the file that has left the last --save_last_n_steps steps."""
        self._save(writers, step_name(self.flags, step), self._expired_step(step, self.flags.save_last_n_steps))

    def save_step_state(self, write: Writer, step: int) -> None:
        """Save `..-step00000100-state`, and delete the state that has left the last --save_last_n_steps_state steps."""
        keep = self.flags.save_last_n_steps_state or self.flags.save_last_n_steps
        self._save_state(write, step_name(self.flags, step), self._expired_step(step, keep))

    def save_epoch(self, writers: Mapping[str, Writer], epoch: int) -> None:
        """Save `..-000005`, and delete the oldest of more than --save_last_n_epochs files."""
        self._save(writers, epoch_name(self.flags, epoch), self._expired_epoch(epoch, self.flags.save_last_n_epochs))

    def save_epoch_state(self, write: Writer, epoch: int) -> None:
        """Save `..-000005-state`, and delete the oldest of more than --save_last_n_epochs_state states."""
        keep = self.flags.save_last_n_epochs_state or self.flags.save_last_n_epochs
        self._save_state(write, epoch_name(self.flags, epoch), self._expired_epoch(epoch, keep))

    def save_last(self, writers: Mapping[str, Writer]) -> None:
        """Save the result of the run."""
        self._save(writers, last_name(self.flags), None)

    def save_last_state(self, write: Writer) -> None:
        """Save the state at the end of the run."""
        self._save_state(write, last_name(self.flags), None)

    def save_named(self, writers: Mapping[str, Writer], suffix: str) -> None:
        """Save `<last name><suffix>`, over the one before."""
        self._save(writers, last_name(self.flags) + suffix, None)

    def path(self, stem: str) -> Path:
        """Where the checkpoint called `stem` lies."""
        return self.directory / f"{stem}{ending(self.flags)}"

    def check(self) -> None:
        """Raise what went wrong in the thread, without waiting for it."""
        while self._running and self._running[0].done():
            self._running.popleft().result()

    def join(self) -> None:
        """Wait until everything is on the disk; raises what went wrong there."""
        while self._running:
            self._running.popleft().result()

    def close(self) -> None:
        """Wait until everything is on the disk and uploaded."""
        self.join()
        self._thread.shutdown(wait=True)
        if self.uploads is not None:
            self.uploads.close()

    def _save(self, writers: Mapping[str, Writer], stem: str, old: str | None) -> None:
        if not self.is_main_process:
            return
        self.join()
        for suffix, write in writers.items():
            path = self.path(stem + suffix)
            logger.info("saving checkpoint: %s", path)
            self.handed_over.append(path.name)
            self._submit(write, path, None if old is None else self.path(old + suffix), self.check_file, True)

    def _save_state(self, write: Writer, stem: str, old: str | None) -> None:
        if not self.is_main_process:
            return
        path = self.directory / (stem + STATE)
        logger.info("saving state: %s", path)
        self.handed_over.append(path.name)
        self._submit(write, path, None if old is None else self.directory / (old + STATE), None, self.upload_states)

    def _submit(self, write: Writer, path: Path, old: Path | None, check: Check | None, upload: bool) -> None:
        uploads = self.uploads if upload else None
        self._running.append(self._thread.submit(_write, write, path, old, check, uploads))
        if uploads is not None and not uploads.in_background:
            self.join()

    def _expired_step(self, step: int, keep: int | None) -> str | None:
        """A file of step x stays while x is among the last `keep` steps: x > step - keep."""
        every = self.flags.save_every_n_steps
        if every is None or keep is None:
            return None
        expired = (step - keep) // every * every
        return step_name(self.flags, expired) if expired > 0 else None

    def _expired_epoch(self, epoch: int, keep: int | None) -> str | None:
        if self.every_epochs is None or keep is None:
            return None
        expired = epoch - self.every_epochs * keep
        return epoch_name(self.flags, expired) if expired > 0 else None


def make_saver(settings: Settings, num_epochs: int, is_main_process: bool, check_file: Check) -> Saver:
    """The saver that the flags ask for; every written file goes through `check_file`."""
    hub = settings[HubFlags]
    states = hub.save_state_to_huggingface
    return Saver(settings[OutputFlags], num_epochs, is_main_process, check_file, uploads_of(hub), states)


def uploads_of(flags: HubFlags) -> Uploads | None:
    """Where `flags` want files uploaded to; None without --huggingface_repo_id."""
    if flags.huggingface_repo_id is None:
        return None
    place = HubPlace(
        repository=flags.huggingface_repo_id,
        kind=flags.huggingface_repo_type or "model",
        folder=flags.huggingface_path_in_repo or "",
        token=flags.huggingface_token,
        public=flags.huggingface_repo_visibility == "public",
    )
    return Uploads(place, in_background=flags.async_upload)


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


def ending(flags: OutputFlags) -> str:
    """How the name of a checkpoint ends; a folder of diffusers has no ending."""
    kind = flags.save_model_as or "safetensors"
    return "" if kind.startswith("diffusers") else f".{kind}"


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


def _write(write: Writer, path: Path, old: Path | None, check: Check | None, uploads: Uploads | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        if check is not None:
            check(path)
    except Exception as error:
        # Said at once: when training itself fails before the next save, nobody asks for the result any more.
        message = f"{path} could not be saved: {error}{CURES.get(getattr(error, 'errno', None) or 0, '')}"
        logger.error("%s", message)
        if isinstance(error, OSError):
            raise OSError(message) from error
        raise
    if uploads is not None:
        uploads.send(path)
    if old is not None and old != path and old.exists():
        logger.info("removing old checkpoint: %s", old)
        remove(old)
