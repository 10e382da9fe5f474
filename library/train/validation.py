"""The loss of held-out images: when it is measured, how, which moment was the best and when to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import cycle, islice
from pathlib import PurePath
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from library.data.dataset import PlannedBatch, TrainingSet
from library.data.items import Batch, BatchRequest
from library.data.loader import BatchOrder, Loader
from library.diffusion.process import Draws, Noised, Process
from library.flags.monitor import ValidationFlags
from library.flags.objective import NoiseFlags
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.aside import in_eval_mode, unchanged_randomness
from library.train.exit_codes import from_data
from library.train.progress import Progress
from library.train.state import Models, Trained
from library.train.step import condition_of, image_losses, latents_of

logger = logging.getLogger(__name__)

NUM_TIMESTEPS = 1000
NUM_POINTS = 4
"""Timesteps at which each image is judged."""
BEST = "-best"
"""How the name of the file with the lowest validation loss ends."""


@dataclass(frozen=True)
class HeldOutOrder(BatchOrder):
    """The batches of a validation: always the same ones, each made by one rank, the first `limit` of them.

    With `in_step` every rank makes equally many: those that would have fewer make some of the first ones too.
    """

    limit: int | None = None
    in_step: bool = False

    def upcoming(self, epoch: int, first_step: int, start_batch: int = 0) -> Iterator[BatchRequest]:
        """This rank's requests; they depend on none of the arguments."""
        planned = self.held_out()
        missing = -len(planned) % self.world_size if self.in_step else 0
        for one in list(islice(cycle(planned), len(planned) + missing))[self.rank :: self.world_size]:
            yield BatchRequest(one.dataset, one.items, one.draws, 1, self.total_steps, self.total_steps)

    def held_out(self) -> list[PlannedBatch]:
        """The batches of all ranks."""
        return self.training_set.epoch_batches(self.seed, 1)[: self.limit]

    @property
    def num_counted(self) -> int:
        """How many of this rank's batches no other rank makes; those after them only keep it in step."""
        return len(self.held_out()[self.rank :: self.world_size])


@dataclass(frozen=True)
class ImageLoss:
    """One held-out image and its loss at each timestep."""

    path: str
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the timesteps."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Measurement:
    """What one validation found."""

    step: int
    timesteps: tuple[int, ...]
    images: tuple[ImageLoss, ...]
    """The highest loss first."""

    @property
    def average(self) -> float:
        """Over images and timesteps."""
        return math.fsum(image.mean for image in self.images) / len(self.images)

    def at_timesteps(self) -> dict[str, float]:
        """`t200` -> the mean over the images at that timestep."""
        columns = zip(*(image.losses for image in self.images), strict=True)
        return {f"t{t}": math.fsum(column) / len(column) for t, column in zip(self.timesteps, columns, strict=True)}

    def rows(self) -> list[dict[str, Any]]:
        """A line for each image, for the log."""
        names = [f"t{t}" for t in self.timesteps]
        return [
            {"image": image.path, "loss": image.mean, **dict(zip(names, image.losses, strict=True))}
            for image in self.images
        ]


@dataclass
class Validation:
    """Measures the loss of the held-out images and remembers the best; without any it is never due.

    Every image is judged at the same timesteps with the same noise each time, so that two measurements differ by
    the weights alone. Each rank judges its share of the batches, and all ranks know the result.
    """

    settings: Settings
    held_out: TrainingSet | None
    arch: Architecture
    accelerator: Accelerator
    seed: int
    """That of the run; --validation_seed wins."""
    train_loader: Loader
    """Says how many processes read images."""
    in_step: bool = False
    """Whether all ranks must run the denoiser equally often."""
    last: Measurement | None = field(default=None, init=False)
    best_loss: float = field(default=math.inf, init=False)
    best_step: int = field(default=0, init=False)
    last_step: int = field(default=0, init=False)
    """The step of the last validation, of this run or of the one it continues."""
    since_best: int = field(default=0, init=False)
    """Validations since the best one."""

    def __post_init__(self) -> None:
        self.flags = self.settings[ValidationFlags]
        if self.flags.validation_seed is not None:
            self.seed = self.flags.validation_seed
        self.timesteps = validation_timesteps(self.settings[NoiseFlags])
        if self.held_out is None:
            report_idle_flags(self.settings)
            return
        self.order = HeldOutOrder(
            self.held_out,
            self.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            total_steps=self.train_loader.order.total_steps,
            limit=self.flags.max_validation_steps,
            in_step=self.in_step,
        )
        train = self.train_loader
        self.loader = Loader(self.order, train.workers, train.persistent, train.pin_memory)

    def due_at_step(self, step: int) -> bool:
        """Whether to validate after optimizer step `step`, 1 for the first."""
        every = self.flags.validate_every_n_steps
        return self.held_out is not None and every is not None and step % every == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether to validate after `epoch`, 1 for the first."""
        return self.held_out is not None and epoch % (self.flags.validate_every_n_epochs or 1) == 0

    @property
    def ends_run(self) -> bool:
        """Whether the loss has not fallen for --early_stop_patience validations."""
        patience = self.flags.early_stop_patience
        return patience is not None and self.since_best >= patience

    def measure(self, models: Models, trained: Trained, step: int) -> bool:
        """Measure the loss of the models as they are after `step`; whether it is the lowest so far.

        A second call for one step, at the end of an epoch, finds nothing new.
        """
        if self.last is None or self.last.step != step:
            self.last = self.measured(models, trained, step)
        if self.last_step == step:
            return False
        return self.judge(self.last)

    def measured(self, models: Models, trained: Trained, step: int) -> Measurement:
        """The losses of the models as they are, from all ranks, and nothing else."""
        device = self.accelerator.device
        modules = [models.denoiser, *models.text_encoders, *trained.modules()]
        paths: list[str] = []
        losses: list[Tensor] = []
        counted = self.order.num_counted
        with torch.no_grad(), unchanged_randomness(device), in_eval_mode(modules):
            for number, batch in enumerate(from_data(self.loader.epoch(1, 0))):
                found = self._losses(batch.to(device), models, trained)
                if number < counted:
                    paths += batch.paths
                    losses.append(found)
        trained.rest()
        columns = torch.cat(losses, dim=1).T.tolist() if losses else []  # waits for the device once
        images = [ImageLoss(path, tuple(column)) for path, column in zip(paths, columns, strict=True)]
        if self.accelerator.num_processes > 1:
            images = gather_object(images)
        images.sort(key=lambda image: (-image.mean, image.path))
        return Measurement(step, self.timesteps, tuple(images))

    def judge(self, found: Measurement) -> bool:
        """Whether `found` is the lowest loss so far."""
        self.last_step = found.step
        if found.average < self.best_loss:  # never true of a loss that is not a number
            self.best_loss, self.best_step, self.since_best = found.average, found.step, 0
            return True
        self.since_best += 1
        return False

    def report(self, progress: Progress, occasion: str, epoch: int) -> None:
        """Log the last measurement; `occasion` is "step" or "epoch"."""
        assert self.last is not None
        found, prefix = self.last, "loss/validation/"
        values = {
            f"{prefix}{occasion}_average": found.average,
            f"{prefix}{occasion}_divergence": found.average - progress.average.value,
        }
        values |= {prefix + name: loss for name, loss in found.at_timesteps().items()}
        progress.log(values, found.step, epoch)
        progress.log_table("validation", found.rows(), found.step)
        logger.info(
            "validation after step %d: loss %.5f, best %.5f after step %d",
            found.step,
            found.average,
            self.best_loss,
            self.best_step,
        )

    def say_why(self) -> None:
        """Say that the run ends early, if it does."""
        if self.ends_run:
            logger.info(
                "the validation loss has not fallen for %d validations (--early_stop_patience): the run ends. "
                "The lowest, %.5f, was after step %d; the weights of that moment are in the file that ends in %s",
                self.since_best,
                self.best_loss,
                self.best_step,
                BEST,
            )

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run must know; goes into JSON."""
        loss = self.best_loss if math.isfinite(self.best_loss) else None
        steps = {"best_step": self.best_step, "last_step": self.last_step, "since_best": self.since_best}
        return {"best_loss": loss, **steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        loss = state["best_loss"]
        self.best_loss = math.inf if loss is None else float(loss)
        self.best_step, self.last_step = int(state["best_step"]), int(state["last_step"])
        self.since_best = int(state["since_best"])

    def _losses(self, batch: Batch, models: Models, trained: Trained) -> Tensor:
        """[T, B] the loss of each image of a batch at each timestep."""
        names = [PurePath(path).name for path in batch.paths]
        device = batch.loss_weights.device
        generators = [Draws.seeded(noise_seed(self.seed, name, -1), device).noise for name in names]
        trained.start_step(batch, self.seed)
        with self.accelerator.autocast():
            latents = latents_of(batch, self.arch, models, generators)
            cond = condition_of(batch, self.arch, models, train_text_encoder=False)
            rows = []
            for t in self.timesteps:
                draws = [Draws.seeded(noise_seed(self.seed, name, t), device) for name in names]
                noised = noised_rows(self.arch.process, latents, draws, t)
                rows.append(image_losses(batch, self.arch, models, trained, latents, noised, cond))
        return torch.stack(rows).float()


def validation_timesteps(flags: NoiseFlags) -> tuple[int, ...]:
    """The inner points of an even division of the range of training: 200, 400, 600, 800 of the whole thousand."""
    first = flags.min_timestep or 0
    end = NUM_TIMESTEPS if flags.max_timestep is None else flags.max_timestep
    width = (end - first) / (NUM_POINTS + 1)
    return tuple(int(first + width * (i + 1)) for i in range(NUM_POINTS))


def noise_seed(seed: int, name: str, t: int) -> int:
    """The seed of one image's noise at timestep `t`; that of its encoding for -1."""
    digest = blake2b(f"validation:{seed}:{name}:{t}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def noised_rows(process: Process, latents: Tensor, draws: Sequence[Draws], t: float) -> Noised:
    """`latents` [B, C, h, w] at timestep `t`, each row with draws of its own, whatever else is in the batch."""
    rows = [process.add_noise(latents[i : i + 1], one, t) for i, one in enumerate(draws)]
    sigmas = [row.sigmas for row in rows if row.sigmas is not None]
    return Noised(
        torch.cat([row.x for row in rows]),
        torch.cat([row.t for row in rows]),
        torch.cat([row.noise for row in rows]),
        torch.cat(sigmas) if sigmas else None,
    )


def report_idle_flags(settings: Settings) -> None:
    """Name the flags that do nothing since no image is held out; with --strict that is a ValueError."""
    names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "early_stop_patience")
    idle = [f"--{name}" for name in names if getattr(settings[ValidationFlags], name) is not None]
    if not idle:
        return
    message = (
        f"no effect without held-out images: {', '.join(idle)}; hold some out with --validation_split "
        "(such as 0.1), or validation_split in the dataset file"
    )
    if settings[StrictFlags].strict:
        raise ValueError(message)
    logger.warning("%s", message)
