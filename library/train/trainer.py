"""The run, from top to bottom: data, models, caches, what is trained, epochs of steps, the last file."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from library.data.debug import described_batches
from library.data.items import Batch
from library.diffusion.process import Draws
from library.flags.console import set_up_logging
from library.flags.dataset import DatasetFlags
from library.flags.fsdp_launcher import sharding_of_launcher
from library.flags.model import ModelFlags
from library.flags.monitor import PreviewFlags
from library.flags.output import LoggingFlags, OutputFlags
from library.flags.run import PrecisionFlags, StepFlags, StrictFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture, ImageRequest
from library.train.accelerator import agreed_seed, make_accelerator, trained_dtype, weight_dtype
from library.train.caches import refuse_what_changes
from library.train.continuity import first_position, go_on, past_of, run_facts
from library.train.deepspeed_updates import division_of
from library.train.dry_run import META, check_output_folder, models_without_weights, report_memory
from library.train.ending import ending_of, exit_code_of
from library.train.exit_codes import ExitCode, from_data, marked
from library.train.frozen_models import frozen_models
from library.train.given_names import check_given_names
from library.train.history import warnings_kept
from library.train.images import images_of_run, loader_of_run
from library.train.interruption import Request, Requests
from library.train.keeping import Keeping
from library.train.memory import MemoryRoom
from library.train.metadata import RunFacts, start_hashing
from library.train.optimizer import evaluating
from library.train.preview import Previews
from library.train.progress import Progress
from library.train.report import announce, report_unused_flags
from library.train.report_page import PageFacts, ReportPage, page_path
from library.train.resume import Parts, state_writer
from library.train.saving import Writer, make_saver
from library.train.state import ParameterGroups, Plan, Trained, TrainState
from library.train.step import step_loss, step_seed
from library.train.trackers import start_trackers
from library.train.updating import updates_of_run
from library.train.validation import Validation
from library.train.watch import Watch

logger = logging.getLogger(__name__)


class Trainer(ABC):
    """One training run. Subclasses say what is trained and how it is written; the rest is the same for all."""

    architecture: ClassVar[type[Architecture]]
    trains_base_model: ClassVar[bool] = False
    """Whether the weights of the base model change, which then are read in the numbers that they are trained in."""
    tracker_name: ClassVar[str] = "network_train"
    """What the project is called where runs are logged, unless --log_tracker_name says otherwise."""
    trains_on_pairs: ClassVar[bool] = False
    """Whether a second image belongs to each, which is part of what is trained and no mask."""

    picture_options: ClassVar[frozenset[str]] = frozenset()
    """Keys of prompt files that what is trained reads, beside those of the family."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = TrainState()
        self.warnings: list[str] = []
        self.code = ExitCode.DONE

    @property
    @abstractmethod
    def trains_text_encoder(self) -> bool:
        """Whether text encoders are among what is trained."""

    @abstractmethod
    def build_trainable(self) -> Trained:
        """Make what is trained out of `self.models`."""

    @abstractmethod
    def parameter_groups(self) -> ParameterGroups:
        """What the optimizer changes, with a learning rate and a name for each group."""

    @abstractmethod
    def write_checkpoint(self, step: int, epoch: int) -> Writer:
        """Take the weights as they are now; the answer writes them to a path, in a thread of its own."""

    @abstractmethod
    def check_file(self, path: Path) -> None:
        """Reopen a file that was just written; ValueError when other programs could not use it."""

    def file_size(self) -> int | None:
        """Bytes of one file of weights if it holds more than what is trained; asked before the first step."""
        return None

    def check_picture(self, request: ImageRequest) -> None:  # noqa: B027 - most can make any picture
        """ValueError for a preview that what is trained could not make; asked before anything is read."""

    def run(self) -> int:
        """Train and return the exit code; a mistake of the user's is one line without a stack trace."""
        set_up_logging(self.settings[LoggingFlags])
        if self.settings[StrictFlags].dry_run:
            return exit_code_of(self.dry_run, self.settings)
        if self.settings[DatasetFlags].debug_dataset:
            return exit_code_of(self.show_data, self.settings)
        return exit_code_of(self.train, self.settings) or self.code

    def train(self) -> None:
        """The whole run."""
        with warnings_kept(self.settings.warnings) as self.warnings:
            self.start()
            self.load_data()
            self.load_models()
            self.trained = self.build_trainable()
            self.prepare()
            # Log lines stand above the progress line, which ends before the last words of a run that fails.
            with logging_redirect_tqdm(), self.requests.listening(), self.progress.until_closed():
                self.run_epochs()
                self.finish()

    def start(self) -> None:
        """Processes, the seed, the family, and every check that needs no model."""
        with marked(ExitCode.SETTINGS):
            self.accelerator = make_accelerator(self.settings)
            self.device = self.accelerator.device
            self.division = division_of(self.settings, self.accelerator)
            self.past = past_of(self.settings, self.division)
            given = self.settings[StepFlags].seed
            self.seed = agreed_seed(self.past.seed if self.past is not None and given is None else given)
            set_seed(self.seed)
            precision = self.settings[PrecisionFlags]
            self.dtype = trained_dtype(precision) if self.trains_base_model else weight_dtype(precision)
            with marked(ExitCode.FAILED):  # some look into their file, and what is wrong with that is no setting
                self.arch = self.architecture(self.settings)
            check_given_names(self.settings)
            self.room = self.memory_room(self.device)
            report_unused_flags(self.settings, self.arch)
            if self.accelerator.is_main_process:
                check_output_folder(self.settings[OutputFlags])
            asked = (self.settings[PreviewFlags], self.settings[OutputFlags])
            self.previews = Previews(*asked, self.arch, self.check_picture, self.picture_options)

    def memory_room(self, device: torch.device) -> MemoryRoom:
        """Where the models of this run lie, with `device` for what is calculated."""
        divided = (sharding_of_launcher(), self.accelerator.num_processes)
        return MemoryRoom(self.settings, self.arch, self.dtype, device, *divided)

    def load_data(self) -> None:
        """Images, captions and the order they come in; with them the length of the run is known."""
        with marked(ExitCode.DATA):
            self.data = images_of_run(self.settings, self.arch, seed=self.seed, control=self.trains_on_pairs)
            refuse_what_changes(self.settings, self.data)
        steps = self.settings[StepFlags]
        self.plan = Plan.of(
            batches_per_epoch=math.ceil(self.data.num_batches / self.accelerator.num_processes),
            accumulation=steps.gradient_accumulation_steps,
            max_steps=steps.max_train_steps,
            max_epochs=steps.max_train_epochs,
        )

    def show_data(self) -> None:
        """List the batches of one epoch as they would be trained, and stop (--debug_dataset)."""
        self.start()
        self.load_data()
        for lines in described_batches(self.data, seed=self.seed, total_steps=self.plan.steps):
            logger.info("%s", lines)

    def load_models(self) -> None:
        """The caches, and the frozen models."""
        self.hashes = start_hashing(self.settings[ModelFlags]) if self.accelerator.is_main_process else {}
        parts = (self.settings, self.arch, self.data, self.accelerator, self.room)
        self.models = frozen_models(*parts, self.previews, trains_text_encoder=self.trains_text_encoder)
        self.models.in_step = self.room.sharding is not None
        self.models.asks_base = self.models.in_step and self.data.keeps_prior

    def prepare(self) -> None:
        """Everything around the step: updates, loader, log, files to come; then stand where the run begins."""
        self.room.attach(self.models, self.trained)
        groups = self.parameter_groups()
        self.updates = updates_of_run(self.settings, groups, self.accelerator, self.plan)
        self.loader = loader_of_run(self.settings, self.data, self.plan, self.accelerator, self.seed)
        judged = (self.settings, self.data.validation, self.arch, self.accelerator, self.seed)
        self.validation = Validation(*judged, self.loader, self.models.in_step)
        self.stand_at_beginning()
        seen = (groups, self.updates.weights, self.updates.optimizer)
        self.watch = Watch(self.settings, self.arch, self.models, *seen)
        page = ReportPage(page_path(self.settings[OutputFlags]), self.announce(groups))
        self.progress = Progress(self.plan, groups.names, self.accelerator, self.settings, self.state.step, page)
        self.prepare_files()
        start_trackers(self.accelerator, self.settings, self.tracker_name)

    def prepare_files(self) -> None:
        """What writes weights and states, what asks for them, and what their metadata says."""
        output, main = self.settings[OutputFlags], self.accelerator.is_main_process
        self.saver = make_saver(self.settings, self.plan.epochs, main, self.check_file)
        taken = (self.state, self.updates, self.watch, self.write_checkpoint, self.state_now)
        self.keeping = Keeping(output, self.saver, *taken, divided=self.division is not None)
        self.requests = Requests(self.saver.directory, main, self.device)
        self.known = RunFacts.of(self.plan, self.accelerator.num_processes, self.seed)

    def announce(self, groups: ParameterGroups) -> PageFacts:
        """Say what this run is going to do."""
        parts = (self.settings, self.arch, self.data, self.plan, groups, self.previews)
        return announce(
            *parts,
            file_size=self.file_size(),
            num_processes=self.accelerator.num_processes,
            seed=self.seed,
            first_step=self.state.step,
            warnings=self.warnings,
        )

    def dry_run(self) -> None:
        """All that can be known without weights: mistakes, the plan, and the memory it will take."""
        self.start()
        self.load_data()
        self.state = first_position(self.settings, self.plan, self.past)
        device, self.device = self.device, META
        self.room = self.memory_room(META)
        parts = (self.settings, self.arch, self.room)
        self.models = models_without_weights(*parts, trains_text_encoder=self.trains_text_encoder)
        self.trained = self.build_trainable()
        groups = self.parameter_groups()
        self.announce(groups)
        report_memory(self.settings, self.arch, self.room, self.models, self.trained, groups, self.data, device)

    def stand_at_beginning(self) -> None:
        """At step 0, or where an earlier run stood."""
        updates = self.updates
        moving = (updates.optimizer, updates.schedule, self.accelerator.scaler, updates.average)
        self.parts = Parts(self.trained.modules(), *moving, self.validation, self.division)
        self.facts = run_facts(self.settings, self.data, self.accelerator.num_processes, self.seed)
        self.state = first_position(self.settings, self.plan, self.past)
        go_on(self.parts, self.state, self.past, self.facts)
        updates.take_weights()
        updates.stand_at(self.state.step)

    def run_epochs(self) -> None:
        """Epochs of steps, from where the state stands to the end of the plan, or until the user ends it."""
        if self.previews.due_at_start and self.state.step == 0:
            self.preview(epoch=0)
        while self.state.step < self.plan.steps and not self.validation.ends_run:
            self.state.enter_epoch()
            self.progress.start_epoch(self.state.epoch)
            self.trained.start_epoch()
            self.run_epoch()
            if self.requests.last.ends_run:
                return
            self.after_epoch()

    def run_epoch(self) -> None:
        """One pass over this rank's batches, or what is left of the plan."""
        state = self.state
        for batch in from_data(self.loader.epoch(state.epoch, state.epoch_start, state.batch)):
            completes = self.plan.completes_update(state.batch)
            loss = self.backward(batch, completes)
            state.micro_step += 1
            state.batch += 1
            self.progress.add_loss(loss)
            if completes:
                self.update()
                self.after_update()
            if state.step >= self.plan.steps or self.requests.last.ends_run or self.validation.ends_run:
                return

    def backward(self, batch: Batch, completes: bool) -> Tensor:
        """The gradient of one batch, the last of an update if it `completes` one; its loss stays on the device."""
        seed = step_seed(self.seed, self.accelerator.process_index, self.state.micro_step)
        torch.manual_seed(seed)  # the dropouts of this step
        draws = Draws.seeded(seed, self.device)
        here = batch.to(self.device)
        self.trained.start_step(here, seed)
        with self.accelerator.autocast():
            loss = step_loss(here, self.arch, self.models, self.trained, draws)
        self.progress.add_batch(len(batch.captions), draws.drawn)
        self.watch.add_batch(batch, draws.drawn, self.state.step + 1, loss)
        self.updates.backward(loss, completes)
        return loss.detach()

    def update(self) -> None:
        """One optimizer step on the mean gradient of all ranks."""
        norm = self.updates.clip()
        if norm is not None:
            self.progress.add_gradient(norm)
            self.watch.add_gradient(norm, is_scaled=self.updates.scales_losses)
        self.trained.before_update()
        self.updates.step()
        self.room.after_update()
        self.state.step += 1
        self.trained.finish_update()
        self.updates.follow()
        self.updates.stand_at(self.state.step)

    def after_update(self) -> None:
        """What the settings ask for after an optimizer step."""
        step = self.state.step
        self.progress.finish_update(step, self.updates.optimizer, self.trained.norms())
        self.watch.finish_update(step)
        if self.previews.due_at_step(step):
            self.preview(epoch=None)
        if self.validation.due_at_step(step):
            self.validate("step", self.state.epoch - 1)
        self.keeping.after_step(self.requests.next())
        self.progress.log_saves(self.saver.handed_over, step)

    def after_epoch(self) -> None:
        """What the settings ask for after an epoch."""
        state = self.state
        self.progress.finish_epoch(state.epoch)
        self.watch.finish_epoch(self.progress.pace.memory())
        if self.validation.due_at_epoch(state.epoch):
            self.validate("epoch", state.epoch)
        kept = self.keeping.after_epoch()
        if self.previews.due_at_epoch(state.epoch):
            self.preview(state.epoch)
        state.leave_epoch(self.plan.batches_per_epoch)
        if kept:
            self.keeping.between_epochs()
        self.progress.log_saves(self.saver.handed_over, state.step)

    def validate(self, occasion: str, epoch: int) -> None:
        """Judge the models as they are now by the held-out images, and keep them if they are the best so far."""
        with self.progress.aside(), evaluating(self.updates.optimizer):
            improved = self.validation.measure(self.models, self.trained, self.state.step)
        self.validation.report(self.progress, occasion, self.state.epoch)
        if improved:
            self.keeping.best(epoch)

    def preview(self, epoch: int | None) -> None:
        """Pictures of the models as they are now, named by `epoch`, or by the step."""
        step = self.state.step
        self.trained.rest()
        with self.progress.aside(), evaluating(self.updates.optimizer):
            files = self.previews.make(self.models, self.accelerator, step, epoch, self.trained)
        self.progress.log_previews(self.previews.described(files), step)

    def state_now(self, finished: bool = False) -> Writer:
        """All that is needed to go on from this moment."""
        return state_writer(self.parts, self.state, self.seed, self.facts, finished)

    def finish(self) -> None:
        """The last file, and every thread joined."""
        if not self.requests.last.ends_run:
            self.validation.say_why()
            self.keeping.last()
        self.progress.log_saves(self.saver.handed_over, self.state.step)
        self.saver.close()
        if self.requests.last is Request.INTERRUPT:
            self.code = ExitCode.INTERRUPTED
        self.progress.close(ending_of(self.requests.last, self.validation.ends_run, self.state.step))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
