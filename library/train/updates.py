"""How gradients become new weights: one buffer for both, the optimizer, its schedule and the moving average."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from library.flags.optimizer import OptimizerFlags, SchedulerFlags
from library.flags.output import EmaFlags
from library.flags.settings import Settings
from library.train.accelerator import from_first_rank, mean_of_ranks
from library.train.ema import MovingWeights
from library.train.flat_parameters import FlatParameters
from library.train.optimizer import is_elementwise, make_optimizer
from library.train.scheduler import make_scheduler
from library.train.state import ParameterGroups, Plan


class Updates:
    """The optimizer steps of a run: `backward` for each batch, then `clip`, `step` and `follow`, in this order.

    Build it when the parameters of `groups` have their final device and dtype; every rank starts from the first one's.
    """

    def __init__(self, settings: Settings, groups: ParameterGroups, accelerator: Accelerator, plan: Plan) -> None:
        flags, decay = settings[OptimizerFlags], settings[EmaFlags].ema_decay
        self.accelerator = accelerator
        self.max_norm = flags.max_grad_norm
        self.flat = FlatParameters(groups.groups)
        self.flat.broadcast(from_first_rank)
        inner = make_optimizer(flags, self.flat.optimizer_groups(is_elementwise(flags)))
        self.optimizer: AcceleratedOptimizer = accelerator.prepare_optimizer(inner)
        self.optimizer.train()  # schedule-free ones start out of training
        self.schedule = make_scheduler(settings[SchedulerFlags], self.optimizer, plan.steps)
        self.average = None if decay is None else MovingWeights(self.flat.values, decay)

    @property
    def scales_losses(self) -> bool:
        """Whether a loss scaler (fp16) handles gradients that overflow."""
        return self.optimizer.scaler is not None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one batch's loss, divided by the accumulation steps, to the flat gradient."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor | None:
        """Average the gradient over the ranks and clip it; its norm before, on the device, if --max_grad_norm clips."""
        self.flat.all_reduce(mean_of_ranks)
        if self.optimizer.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        return self.flat.clip_(self.max_norm) if self.max_norm else None

    def step(self) -> None:
        """One optimizer step and one of the schedule; the gradient is cleared."""
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:  # by the loss scaler of fp16
            self.schedule.step()
        self.flat.zero_grad()

    def follow(self) -> None:
        """Let the moving average take in the weights of this step, once they are final."""
        if self.average is not None:
            self.average.update()
