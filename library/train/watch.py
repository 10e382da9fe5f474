"""Whether a run still makes sense: losses, gradients, weights and memory, seen without waiting for the device."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.data.items import Batch
from library.flags.output import OutputFlags
from library.flags.run import StrictFlags
from library.flags.settings import Settings
from library.models.architecture import Architecture
from library.train.diagnosis import likely_causes
from library.train.exit_codes import ExitCode, RunError
from library.train.saving import STATE, ending, last_name
from library.train.scalar_reader import ScalarReader
from library.train.state import Models, ParameterGroups

logger = logging.getLogger(__name__)

FIRST_LOOK = 20
"""Updates after which every group must have moved."""
EVERY = 50
"""Updates between two looks at the size of the weights."""
EXPLODED = 10.0
"""Growth of the weights' norm that is worth a word."""
EPOCHS_OF_GROWTH = 4
"""Memory that has grown from each of so many epochs to the next, and by both of these in all, is worth a word."""
GROWTH, GROWTH_GB = 0.1, 0.3


@dataclass(frozen=True)
class Seen:
    """A batch whose loss has not been read yet."""

    step: int
    batch: Batch
    """On the CPU."""
    timesteps: tuple[Tensor, ...]

    def text(self) -> str:
        """Which images, at which timesteps."""
        drawn = [str(t) for part in self.timesteps for t in part.tolist()]
        at = f" at timestep {', '.join(drawn)}" if drawn else ""
        return f"step {self.step}{at}, images: {', '.join(self.batch.paths)}"


class Watch:
    """Sees every loss, one step late, and now and then the weights; says each kind of trouble once.

    `RunError` with the exit code of what is not finite ends the run after --max_nonfinite_steps losses, or gradients,
    in a row that are not finite, and whenever weights would be saved that are not.
    """

    def __init__(
        self,
        settings: Settings,
        arch: Architecture,
        models: Models,
        groups: ParameterGroups,
        weights: Sequence[Tensor],
        optimizer: Optimizer,
    ) -> None:
        self.settings = settings
        self.arch = arch
        self.models = models
        self.groups = groups
        self.weights = weights
        self.optimizer = optimizer
        self.most = settings[StrictFlags].max_nonfinite_steps
        self.start_norms = self._tensor_norms()
        self.memory: list[Mapping[str, float]] = []
        self._started = time.time()
        self._said: set[str] = set()
        self._batches: deque[Seen] = deque()
        self._losses, self._gradients, self._sizes = ScalarReader(), ScalarReader(), ScalarReader()
        self._bad_losses = self._bad_gradients = 0
        self._updates = 0
        self._recent: Seen | None = None
        self._last_of_update: deque[Seen] = deque()

    def add_batch(self, batch: Batch, timesteps: Sequence[Tensor], step: int, loss: Tensor) -> None:
        """A batch on the CPU for optimizer step `step`, the timesteps drawn for it, and its loss on the device."""
        self._batches.append(Seen(step, batch, tuple(timesteps)))
        self._judge_loss(self._losses.exchange(loss))

    def add_gradient(self, norm: Tensor, is_scaled: bool) -> None:
        """The norm of the gradient of all ranks; one that is scaled (fp16) may overflow, which its scaler handles."""
        if is_scaled:
            return
        self._last_of_update.append(self._batches[-1])
        value = self._gradients.exchange(norm)
        if value is None:
            return
        seen = self._last_of_update.popleft()
        self._bad_gradients = 0 if math.isfinite(value) else self._bad_gradients + 1
        if self._bad_gradients and not self._bad_losses:  # of the two the loss came first
            self._complain("gradient", value, self._bad_gradients, seen)

    def finish_update(self, step: int) -> None:
        """Optimizer step `step` is done."""
        self._updates += 1
        if self._updates == FIRST_LOOK:
            self._look_for_movement(step)
        if self._updates % EVERY == 0:
            self._judge_size(self._sizes.exchange(_norm(self.weights)), step)

    def finish_epoch(self, memory: Mapping[str, float]) -> None:
        """An epoch is done; `memory` holds how many GB are in use, by what for."""
        self.memory.append(dict(memory))
        recent = self.memory[-EPOCHS_OF_GROWTH:]
        if len(self.memory) <= EPOCHS_OF_GROWTH:  # the first epoch fills what is kept for all others
            return
        for name in recent[0].keys() & recent[-1].keys() - {"memory/device_peak_gb"}:
            sizes = [entry.get(name, 0.0) for entry in recent]
            grown = sizes[-1] - sizes[0]
            steadily = all(after > before for before, after in zip(sizes, sizes[1:], strict=False))
            if steadily and grown > GROWTH_GB and grown > GROWTH * sizes[0]:
                where = "main memory" if "process" in name else "the memory of the device"
                text = ", ".join(f"{size:.1f}" for size in sizes)
                self._say(
                    name,
                    f"{where} grows from epoch to epoch: {text} GB after the last {len(sizes)}; something is kept that "
                    "should not be (previews, a network module of your own, --persistent_data_loader_workers)",
                )

    def refuse_broken_weights(self) -> None:
        """RunError unless all weights are finite: called before they are saved. Waits for the device."""
        if not self.weights_are_finite():
            raise RunError(
                f"the trained weights are not finite, so they are not saved; {self._last_good()}. "
                f"{self._causes(self._recent)}",
                ExitCode.NOT_FINITE,
            )

    def weights_are_finite(self) -> bool:
        """Whether no weight is infinite or not a number. Waits for the device."""
        return all(bool(values.isfinite().all()) for values in self.weights)

    def _judge_loss(self, value: float | None) -> None:
        if value is None:
            return
        self._recent = self._batches.popleft()
        self._bad_losses = 0 if math.isfinite(value) else self._bad_losses + 1
        if self._bad_losses:
            self._complain("loss", value, self._bad_losses, self._recent)

    def _complain(self, what: str, value: float, count: int, seen: Seen) -> None:
        """Say it at the first of several in a row, and end the run at the last."""
        if count == 1:
            logger.warning("the %s is %s: %s", what, value, seen.text())
        if count >= self.most:
            raise RunError(
                f"the {what} was not finite {count} times in a row (--max_nonfinite_steps), last in {seen.text()}; "
                f"{self._last_good()}. {self._causes(seen)}",
                ExitCode.NOT_FINITE,
            )

    def _causes(self, seen: Seen | None) -> str:
        batch = Batch([], torch.ones(0)) if seen is None else seen.batch
        finite = self.weights_are_finite()
        causes = likely_causes(self.settings, self.arch, self.models, batch, self._rates(), finite)
        return "Likely cause: " + "; or: ".join(causes)

    def _last_good(self) -> str:
        file = newest_file(self.settings[OutputFlags], self._started)
        return "no file was saved before" if file is None else f"the last good file is {file}"

    def _rates(self) -> list[float]:
        """Learning rates, where no optimizer estimates them."""
        groups = self.optimizer.param_groups
        return [float(group["lr"]) for group in groups if group.get("d") is None and group["lr"] is not None]

    def _tensor_norms(self) -> list[list[float]]:
        """The norm of every tensor of every group."""
        found = []
        for group in self.groups.groups:
            norms = (
                torch._foreach_norm([parameter.detach() for parameter in group["params"]]) if group["params"] else ()
            )
            found.append(torch.stack([norm.float() for norm in norms]).tolist() if norms else [])  # one wait a group
        return found

    def _look_for_movement(self, step: int) -> None:
        """Weights that begin at zero, or if there are none all weights, must have left where they began."""
        for number, (before, after) in enumerate(zip(self.start_norms, self._tensor_norms(), strict=True)):
            zeros = [i for i, norm in enumerate(before) if norm == 0]
            judged = zeros or range(len(before))
            stays = not any(parameter.requires_grad for parameter in self.groups.groups[number]["params"])
            if not before or stays or any(after[i] != before[i] for i in judged):
                continue
            rate = self._group_rate(number)
            why = (
                "its learning rate is 0"
                if rate == 0
                else "no gradient reaches it: look at --network_args, --min_timestep and at what is trained"
            )
            name = self.groups.names[number]
            self._say(f"unmoved {name}", f"after step {step} nothing has been learnt in parameter group {name}: {why}")

    def _group_rate(self, number: int) -> float | None:
        groups = self.optimizer.param_groups
        return groups[number]["lr"] if number < len(groups) else None

    def _judge_size(self, norm: float | None, step: int) -> None:
        if norm is None:
            return
        start = math.sqrt(sum(value * value for group in self.start_norms for value in group))
        if not math.isfinite(norm):
            self.refuse_broken_weights()
        elif norm > EXPLODED * start > 0:
            self._say(
                "exploded",
                f"by step {step} the weights have grown to {norm / start:.0f} times their norm at the beginning: "
                "the learning rate is likely too high; pictures will look burnt (--scale_weight_norms limits them)",
            )

    def _say(self, key: str, message: str) -> None:
        """Say it the first time."""
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s", message)


def newest_file(flags: OutputFlags, since: float) -> Path | None:
    """The newest file of weights of this run, which began at the time `since`."""
    name = last_name(flags)
    found = {
        path: path.stat().st_mtime
        for path in Path(flags.output_dir or ".").glob(f"*{ending(flags)}")
        if is_named(path.name.removesuffix(ending(flags)), name)
    }
    files = [path for path, written in found.items() if written >= since]
    return max(files, key=lambda path: found[path], default=None)


def is_named(stem: str, name: str) -> bool:
    """Whether `stem` is that of a checkpoint of the run called `name`; states are folders as some checkpoints are."""
    return (stem == name or stem.startswith(f"{name}-")) and not stem.endswith(STATE)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The joint norm, a scalar on the device of the first."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
