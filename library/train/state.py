"""What a training run holds in its hands: the models, what is trained, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from library.data.items import Batch
from library.models.architecture import AbsentEncoder, ImageRequest


@dataclass
class Models:
    """The frozen models of a run; the VAE is gone once every latent is cached."""

    text_encoders: list[nn.Module]
    """In the order of the family; empty when all of their answers are cached."""
    denoiser: nn.Module
    vae: nn.Module | None = None
    in_step: bool = False
    """Whether the denoiser's weights are divided among the ranks (FSDP), so that all must run it equally often."""
    asks_base: bool = False
    """Whether the base model is asked with every batch, since it must be with some and the ranks keep in step."""

    @property
    def live_encoders(self) -> list[nn.Module | None]:
        """The text encoders, with None for those that are not in memory."""
        return [None if isinstance(encoder, AbsentEncoder) else encoder for encoder in self.text_encoders]


@dataclass
class TrainState:
    """How far the run has come."""

    epoch: int = 0
    """The running epoch, 1 for the first."""
    step: int = 0
    """Optimizer steps finished."""
    micro_step: int = 0
    """Batches seen by this rank."""
    batch: int = 0
    """Batches of the running epoch seen by this rank; 0 between two epochs."""
    epoch_start: int = 0
    """Optimizer steps finished when the running epoch began."""

    def enter_epoch(self) -> None:
        """Begin the next epoch, unless a run was resumed inside one."""
        if self.batch == 0:
            self.epoch += 1
            self.epoch_start = self.step

    def leave_epoch(self, batches_per_epoch: int) -> None:
        """All that belongs to the epoch is done; one that was cut short by the end of the run stays open."""
        if self.batch >= batches_per_epoch:
            self.batch = 0


class Trained(Protocol):
    """What a run changes, as the step and the trainer see it."""

    @property
    def trains_text_encoder(self) -> bool:
        """Whether gradients reach the text encoders."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """While the context lasts the base model answers."""
        ...

    def start_epoch(self) -> None:
        """Called before each epoch."""
        ...

    def start_step(self, batch: Batch, seed: int) -> None:
        """Called before each batch, on its device, goes through the models; what is drawn depends on `seed` alone."""
        ...

    def rest(self) -> None:
        """Called before pictures are made: the multipliers of the last batch are for no image any more."""
        ...

    def start_picture(self, request: ImageRequest) -> None:
        """Called before each picture is made."""
        ...

    def before_update(self) -> None:
        """Called before each optimizer step, when the gradient has its final value."""
        ...

    def finish_update(self) -> None:
        """Called after each optimizer step."""
        ...

    def modules(self) -> list[nn.Module]:
        """What is trained beside the models, so that previews can put it into eval mode."""
        ...

    def norms(self) -> dict[str, float]:
        """What the log says about the size of the weights."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long the run is."""

    batches_per_epoch: int
    """Batches of one rank."""
    accumulation: int
    updates_per_epoch: int
    epochs: int
    steps: int
    """Optimizer steps of the whole run."""

    @staticmethod
    def of(batches_per_epoch: int, accumulation: int, max_steps: int, max_epochs: int | None) -> Plan:
        """`max_epochs`, when given, decides the number of steps; otherwise `max_steps` the number of epochs."""
        updates = -(-batches_per_epoch // accumulation)
        steps = max_epochs * updates if max_epochs is not None else max_steps
        return Plan(batches_per_epoch, accumulation, updates, -(-steps // updates), steps)

    def position(self, step: int) -> TrainState:
        """Where a run stands after `step` optimizer steps."""
        epochs, updates = divmod(step, self.updates_per_epoch)
        batch = updates * self.accumulation
        return TrainState(
            epoch=epochs + 1 if batch else epochs,
            step=step,
            micro_step=epochs * self.batches_per_epoch + batch,
            batch=batch,
            epoch_start=epochs * self.updates_per_epoch,
        )

    def completes_update(self, batch_index: int) -> bool:
        """Whether the optimizer steps after this batch: accumulated batches never reach into the next epoch."""
        return (batch_index + 1) % self.accumulation == 0 or batch_index + 1 == self.batches_per_epoch


@dataclass
class ParameterGroups:
    """What the optimizer changes, and a name for each group in the log."""

    groups: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ends: Mapping[int, int] = field(default_factory=dict)
    """Number of a group -> the optimizer step after which it stays as it is."""
