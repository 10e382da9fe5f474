"""How gradients become new weights: what every way of doing it has in common, and the usual one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import EmaFlags
from library.flags.settings import Settings
from library.train.accelerator import from_first_rank, mean_of_ranks
from library.train.ema import MovingWeights
from library.train.flat_parameters import FlatParameters
from library.train.optimizer import is_elementwise, make_optimizer
from library.train.scheduler import make_scheduler
from library.train.state import ParameterGroups, Plan


class Updates(ABC):
    """The optimizer steps of a run: `backward` for each batch, then `clip`, `step` and `follow`, in this order."""

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        plan: Plan,
        groups: list[dict[str, Any]],
        weights: Sequence[Tensor],
        ends: Mapping[int, int],
    ) -> None:
        """`groups` are those of the optimizer; `weights` hold all that is trained, in as few tensors as possible.

        `ends` is as in `ParameterGroups`.
        """
        flags, decay = settings[OptimizerFlags], settings[EmaFlags].ema_decay
        self.accelerator = accelerator
        self.max_norm = flags.max_grad_norm
        self._ends = dict(ends)
        self._decay = decay
        self.optimizer: AcceleratedOptimizer = accelerator.prepare_optimizer(make_optimizer(flags, groups))
        self.optimizer.train()  # schedule-free ones start out of training
        self.schedule = make_scheduler(settings[SchedulerFlags], self._stepped, plan.steps)
        self._follow(weights)

    def _follow(self, weights: Sequence[Tensor]) -> None:
        """`weights` are where all that is trained lies."""
        self.weights = list(weights)
        self.average = None if self._decay is None else MovingWeights(self.weights, self._decay)

    @property
    def _stepped(self) -> Optimizer:
        """The one whose `step` is called: schedules look at that."""
        return self.optimizer

    @abstractmethod
    def backward(self, loss: Tensor, completes: bool) -> None:
        """Differentiate the loss of one batch; it counts for one part of as many as are accumulated.

        `completes` says that an update follows before the next batch.
        """

    @abstractmethod
    def clip(self) -> Tensor | None:
        """Bring the gradient to its final value; its norm before it was clipped, on the device, if it was."""

    @abstractmethod
    def step(self) -> None:
        """One step of the optimizer and of the schedule; no gradient is left."""

    def stand_at(self, step: int) -> None:
        """`step` optimizer steps are done: the groups that end here stay as they are from now on."""
        for group in [group for group, end in self._ends.items() if step >= end]:
            del self._ends[group]
            self.retire(group)

    def take_weights(self) -> None:  # noqa: B027 - most have them nowhere else
        """Called when weights have been written from outside, as by --resume."""

    @abstractmethod
    def retire(self, group: int) -> None:
        """Let the weights of a group get no gradient and no update any more."""

    @property
    def scales_losses(self) -> bool:
        """Whether a loss scaler (fp16) handles gradients that overflow."""
        return self.optimizer.scaler is not None

    def follow(self) -> None:
        """Let the moving average take in the weights of this step, once they are final."""
        if self.average is not None:
            self.average.update()


class FlatUpdates(Updates):
    """Gradients are collected in one buffer, averaged over the ranks, clipped together and applied at once.

    Build it when the parameters of `groups` have their final device and dtype; every rank starts from the first one's.
    """

    def __init__(self, settings: Settings, groups: ParameterGroups, accelerator: Accelerator, plan: Plan) -> None:
        self.flat = FlatParameters(groups.groups)
        self.flat.broadcast(from_first_rank)
        for_optimizer = self.flat.optimizer_groups(is_elementwise(settings[OptimizerFlags]))
        super().__init__(settings, accelerator, plan, for_optimizer, self.flat.values, groups.ends)

    def backward(self, loss: Tensor, completes: bool) -> None:
        """Add the gradient of one batch to the buffer."""
        self.accelerator.backward(loss)  # divides by the accumulation steps

    def clip(self) -> Tensor | None:
        """Average the gradient over the ranks and clip all of it by its joint norm."""
        self.flat.all_reduce(mean_of_ranks)
        if self.optimizer.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        return self.flat.clip_(self.max_norm) if self.max_norm else None

    def step(self) -> None:
        """One step of the optimizer and of the schedule, and a buffer of zeros."""
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:  # by the loss scaler of fp16
            self.schedule.step()
        self.flat.zero_grad()

    def retire(self, group: int) -> None:
        """Its part of the buffer keeps zeros for a gradient, and the optimizer does not see it."""
        self.flat.retire(group)
