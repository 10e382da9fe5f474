"""Updates by DeepSpeed, which divides optimizer states and gradients among the ranks (--deepspeed, ZeRO 0 to 2)."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from library.flags.optimizer import OptimizerFlags
from library.flags.run import DistributedFlags, StepFlags
from library.flags.settings import Settings
from library.train.accelerator import from_first_rank
from library.train.division import Division
from library.train.state import ParameterGroups, Plan
from library.train.updates import Updates

NEVER = 1 << 62
"""Steps between two of DeepSpeed's own reports: the run has its own."""


class DeepSpeedUpdates(Updates):
    """DeepSpeed's engine holds the parameters of the groups: it averages, clips and applies their gradients.

    The forward pass stays the run's own, with its autocast: the engine sees the trained parameters alone, and
    gradients reach it through hooks on them. ZeRO 0 is plain averaging, 1 divides the optimizer state among the ranks
    and 2 the gradients too (Rajbhandari et al. 2020). Every rank starts from the first one's weights.
    """

    def __init__(self, settings: Settings, groups: ParameterGroups, accelerator: Accelerator, plan: Plan) -> None:
        self._parameters = [parameter for group in groups.groups for parameter in group["params"]]
        for parameter in self._parameters:
            from_first_rank(parameter.data)
        super().__init__(settings, accelerator, plan, groups.groups, (), groups.ends)
        self._divides = settings[DistributedFlags].zero_stage > 0
        _join_alone(accelerator)
        self._engine = make_engine(engine_config(settings), nn.ParameterList(self._parameters), self._stepped)
        self._follow([parameter.data for parameter in self._parameters])  # where the engine has put them

    @property
    def _stepped(self) -> Optimizer:
        """The one inside accelerate's: the engine knows no other."""
        inner: Optimizer = self.optimizer.optimizer
        return inner

    def backward(self, loss: Tensor, completes: bool) -> None:
        """Differentiate one batch; with the last one of an update gradients are averaged over the ranks."""
        self._engine.set_gradient_accumulation_boundary(completes)
        self._engine.backward(loss)  # divides by the accumulation steps

    def clip(self) -> Tensor | None:
        """Clip the gradient by its joint norm; where it is divided, the engine does that and the step in one."""
        if not self._divides:
            return self._clip_whole() if self.max_norm else None
        self._engine.step()
        if not self.max_norm:
            return None
        # Infinite when it was not finite, and then no weight has moved.
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def step(self) -> None:
        """One step of the optimizer, unless it has been made already, and of the schedule."""
        if not self._divides:
            self._engine.step()
        self.schedule.step()

    def take_weights(self) -> None:
        """Bring the copies up to date that the optimizer works on, where they are divided."""
        if self._divides:
            self._engine.optimizer.refresh_fp32_params()

    def retire(self, group: int) -> None:
        """Refused before the run begins: the engine's buffers are for all of it."""
        raise ValueError(f"--deepspeed cannot leave group {group} as it is before the run ends: drop one of both flags")

    def _clip_whole(self) -> Tensor:
        """The same numbers as without DeepSpeed: a gradient that is not finite becomes zero."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.max_norm)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return norm


def division_of(settings: Settings, accelerator: Accelerator) -> Division | None:
    """How the optimizer's state is divided in a run with these settings."""
    flags = settings[DistributedFlags]
    if not flags.deepspeed or flags.zero_stage == 0:
        return None
    processes = (accelerator.num_processes, accelerator.process_index, accelerator.device)
    return Division(f"--deepspeed --zero_stage={flags.zero_stage}", *processes)


def engine_config(settings: Settings) -> dict[str, Any]:
    """What DeepSpeed calls its configuration. Numbers stay those of the trained weights: autocast is the run's."""
    flags = settings[DistributedFlags]
    zero: dict[str, Any] = {"stage": flags.zero_stage}
    if flags.offload_optimizer_device is not None:
        zero["offload_optimizer"] = {"device": flags.offload_optimizer_device}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own counts, which nobody reads
        "gradient_accumulation_steps": settings[StepFlags].gradient_accumulation_steps,
        "gradient_clipping": settings[OptimizerFlags].max_grad_norm if flags.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # the rules of the flags say which
        "zero_force_ds_cpu_optimizer": False,  # the optimizer stays the chosen one, on the CPU too
        "steps_per_print": NEVER,
    }


def make_engine(config: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> Any:
    """The engine over the parameters of `module`; ValueError when the package is missing."""
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise ValueError(f"--deepspeed needs the package deepspeed ({error}): pip install deepspeed") from error
    # The processes have met already.
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _join_alone(accelerator: Accelerator) -> None:
    """DeepSpeed talks to the ranks of a group, so a process without others becomes a group of one."""
    if not distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(accelerator.local_process_index))  # which launchers set
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
