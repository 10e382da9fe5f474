"""Updating each weight during the backward pass, as soon as its gradient is known (--fused_backward_pass)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from library.flags.settings import Settings
from library.train.accelerator import from_first_rank, mean_of_ranks
from library.train.state import ParameterGroups, Plan
from library.train.updates import Updates


class FusedUpdates(Updates):
    """A gradient lives from the moment it is complete until its weight has been updated, so few exist at a time.

    For optimizers whose step of one tensor depends on no other tensor (Adafactor). The result is that of `FlatUpdates`
    bit for bit, except that --max_grad_norm clips each tensor by its own norm: that of all is not known before the
    first weight moves. With several ranks all take the tensors in the same order, whatever each one's graph does.
    """

    def __init__(self, settings: Settings, groups: ParameterGroups, accelerator: Accelerator, plan: Plan) -> None:
        groups_of = {parameter: number for number, group in enumerate(groups.groups) for parameter in group["params"]}
        self._group_of = groups_of
        self._many_ranks = accelerator.num_processes > 1
        self._order = list(reversed(groups_of))  # about as backward comes to them
        self._waiting = dict.fromkeys(self._order)
        self._arrived: set[nn.Parameter] = set()
        self._norms: list[Tensor] = []
        for parameter in groups_of:
            from_first_rank(parameter.data)
            parameter.register_post_accumulate_grad_hook(self._take)
        weights = [parameter.data for parameter in groups_of]
        super().__init__(settings, accelerator, plan, groups.groups, weights, groups.ends)
        self._inner: Optimizer = self.optimizer.optimizer

    def backward(self, loss: Tensor, completes: bool) -> None:
        """Differentiate, and update every weight that a gradient reaches."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor | None:
        """Update the weights that no gradient has reached, for which it is zero; the joint norm of all gradients."""
        for parameter in list(self._waiting):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._update(parameter)
        self._waiting = dict.fromkeys(self._order)
        self._arrived.clear()
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def step(self) -> None:
        """One step of the schedule: the weights have moved already."""
        self.schedule.step()

    def retire(self, group: int) -> None:
        """Its tensors are not waited for any more."""
        for parameter in self._order:
            if self._group_of[parameter] == group:
                parameter.requires_grad_(False)
        self._order = [parameter for parameter in self._order if self._group_of[parameter] != group]
        self._waiting = dict.fromkeys(self._order)

    def _take(self, parameter: Tensor) -> None:
        """A gradient is complete: update its weight now, or with several ranks when it is its turn."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter in self._waiting, "a gradient came twice in one backward pass"
        if not self._many_ranks:
            self._update(parameter)
            return
        self._arrived.add(parameter)
        while self._waiting and (first := next(iter(self._waiting))) in self._arrived:
            self._update(first)

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        del self._waiting[parameter]
        grad = parameter.grad
        assert grad is not None
        mean_of_ranks(grad)
        if self.max_norm:
            norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
            self._norms.append(norm.to(self._order[0].device))
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            grad.mul_(factor.to(grad.dtype)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        with self._alone(parameter):
            self.optimizer.step()
        parameter.grad = None

    @contextmanager
    def _alone(self, parameter: nn.Parameter) -> Iterator[None]:
        """While the context lasts the optimizer has no parameter but this one."""
        groups = self._inner.param_groups
        self._inner.param_groups = [groups[self._group_of[parameter]] | {"params": [parameter]}]
        try:
            yield
        finally:
            self._inner.param_groups = groups
