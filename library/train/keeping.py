"""When weights and states are taken to be kept: after steps, after epochs, at the best moment and at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from library.flags.output import OutputFlags
from library.train.interruption import Request
from library.train.optimizer import evaluating
from library.train.saving import Saver, Writer
from library.train.state import TrainState
from library.train.updates import Updates
from library.train.validation import BEST
from library.train.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """Hands the saver what is to be written, taken as it is at that moment.

    Every rank calls its methods. The first one writes; the others are there for their parts of a divided state.
    """

    flags: OutputFlags
    saver: Saver
    state: TrainState
    """Of the run, which moves on."""
    updates: Updates
    watch: Watch
    write_checkpoint: Callable[[int, int], Writer]
    """(step, epoch) -> what writes the weights of now; their metadata says which step and epoch that was."""
    write_state: Callable[[bool], Writer]
    """Whether the run is finished -> what writes all that is needed to go on."""
    divided: bool = False
    """Every rank has a part of the state."""

    def after_step(self, asked: Request) -> None:
        """The files and the state due after a step, by the settings or because the user `asked` for them."""
        step = self.state.step
        self.saver.check()
        if not self.saver.due_at_step(step, asked):
            return
        self._keep_weights(self.state.epoch - 1, lambda files: self.saver.save_step(files, step))
        if self.flags.save_state or asked.ends_run:
            self._keep_state(False, lambda write: self.saver.save_step_state(write, step))

    def after_epoch(self) -> bool:
        """The files due after an epoch; whether there were any."""
        epoch = self.state.epoch
        due = self.saver.due_at_epoch(epoch)
        if due:
            self._keep_weights(epoch, lambda files: self.saver.save_epoch(files, epoch))
        return due

    def between_epochs(self) -> None:
        """The state that goes with the files of the epoch that is over."""
        if self.flags.save_state:
            self._keep_state(False, lambda write: self.saver.save_epoch_state(write, self.state.epoch))

    def best(self, epoch: int) -> None:
        """The file of the lowest validation loss; its metadata says `epoch`."""
        self._keep_weights(epoch, lambda files: self.saver.save_named(files, BEST))

    def last(self) -> None:
        """The files and the state at the end of the run."""
        self._keep_weights(self.state.epoch, self.saver.save_last)
        if self.flags.save_state or self.flags.save_state_on_train_end:
            self._keep_state(True, self.saver.save_last_state)

    def _keep_weights(self, epoch: int, save: Callable[[dict[str, Writer]], None]) -> None:
        if self.saver.is_main_process:
            save(self.checkpoints(epoch))

    def _keep_state(self, finished: bool, save: Callable[[Writer], None]) -> None:
        if self.saver.is_main_process or self.divided:
            save(self.write_state(finished))

    def checkpoints(self, epoch: int) -> dict[str, Writer]:
        """What the files of this moment will hold, by what is put behind their name; their metadata says `epoch`."""
        self.watch.refuse_broken_weights()
        with evaluating(self.updates.optimizer):
            writers = {"": self.write_checkpoint(self.state.step, epoch)}
        if self.updates.average is not None:
            with self.updates.average.in_place():
                writers["-ema"] = self.write_checkpoint(self.state.step, epoch)
        return writers
