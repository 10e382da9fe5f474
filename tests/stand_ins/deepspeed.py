"""Stands in for the package deepspeed: what a run uses of it, with parts of tensors that really are divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer


class DividedOptimizer:
    """Each rank updates its part of the tensors of a group, laid end to end, as ZeRO 1 and 2 do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.wholes: list[tuple[list[nn.Parameter], Tensor]] = []
        ranks, self.rank = distributed.get_world_size(), distributed.get_rank()
        for group in optimizer.param_groups:
            parameters: list[nn.Parameter] = group["params"]
            flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
            whole = torch.cat([flat, flat.new_zeros(-len(flat) % ranks)])
            for parameter, values in zip(
                parameters, whole.split([p.numel() for p in parameters] + [-len(flat) % ranks])
            ):
                parameter.data = values.view(parameter.shape)
            self.wholes.append((parameters, whole.view(ranks, -1)))
            group["params"] = [nn.Parameter(whole.view(ranks, -1)[self.rank].clone())]

    @property
    def parts(self) -> list[nn.Parameter]:
        """This rank's part of each group."""
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    def refresh_fp32_params(self) -> None:
        """Take the parts from the weights anew."""
        for part, (_, whole) in zip(self.parts, self.wholes, strict=True):
            part.data.copy_(whole[self.rank])

    def step(self) -> None:
        """Update the parts, and tell the other ranks."""
        for part, (parameters, whole) in zip(self.parts, self.wholes, strict=True):
            gradient = torch.zeros_like(whole).flatten()
            torch.cat([p.grad.flatten() for p in parameters], out=gradient[: sum(p.numel() for p in parameters)])
            part.grad = gradient.view_as(whole)[self.rank].clone()
        self.optimizer.step()
        for part, (_, whole) in zip(self.parts, self.wholes, strict=True):
            whole[self.rank] = part.detach()
            for rank, values in enumerate(whole):
                distributed.broadcast(values, src=rank)


class Engine:
    """What the updates use of `deepspeed.DeepSpeedEngine`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: dict[str, Any], dist_init_required: bool):
        self.config, self.dist_init_required = config, dist_init_required
        self.parameters = list(model.parameters())
        self.boundaries: list[bool] = []
        self.norm: Tensor | None = None
        self.optimizer = DividedOptimizer(optimizer) if config["zero_optimization"]["stage"] else optimizer

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Whether an update follows on the next backward pass."""
        self.boundaries.append(is_boundary)

    def backward(self, loss: Tensor) -> None:
        """Add a gradient; that of an update is the mean of all ranks."""
        (loss / self.config["gradient_accumulation_steps"]).backward()
        for parameter in self.parameters if self.boundaries[-1] else []:
            distributed.all_reduce(parameter.grad)
            parameter.grad.div_(distributed.get_world_size())

    def step(self) -> None:
        """Clip and update."""
        assert self.boundaries[-1]
        if self.config["gradient_clipping"]:
            self.norm = nn.utils.clip_grad_norm_(self.parameters, self.config["gradient_clipping"])
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def get_global_grad_norm(self) -> float:
        """Before it was clipped."""
        assert self.norm is not None
        return float(self.norm)


def initialize(**parts: Any) -> tuple[Engine, None, None, None]:
    """As DeepSpeed's, which also answers the optimizer, a loader and a schedule."""
    return Engine(**parts), None, None, None
