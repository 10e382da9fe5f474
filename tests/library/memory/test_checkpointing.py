from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.memory.checkpointing import Recompute, checkpoint_blocks


class Changed(nn.Module):
    """Products that are changed in place afterwards, in the ways that adapters do."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Linear(6, 6), nn.Linear(6, 6), change

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            held = torch.nn.functional.linear(x, self.first.weight)
            self.change(held, x)
        return self.second(torch.tanh(held) * x).sigmoid() * self.first(x)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda y, x: y,
    "a sum": lambda y, x: y.add_(x),
    "a factor": lambda y, x: y.mul_(0.5),
    "a product": lambda y, x: y.view(-1, 6).addmm_(x.view(-1, 6), torch.eye(6)),
    "some rows": lambda y, x: y[0].add_(1.0),
    "several": lambda y, x: y.add_(x).view(-1, 6).addmm_(x.view(-1, 6), torch.eye(6)).mul_(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_added_to_a_kept_product_is_not_added_twice(change: str) -> None:
    found = []
    for recompute in Recompute:
        torch.manual_seed(0)
        block = Changed(CHANGES[change])
        checkpoint_blocks([block], recompute)
        x = torch.randn(2, 3, 6, requires_grad=True)
        y = block(x)
        y.square().sum().backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_block_that_calculates_something_else_the_second_time_is_an_error() -> None:
    calls: list[int] = []

    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            y = x @ x if len(calls) == 1 else torch.bmm(x[None], x[None])[0]
            return y.tanh() * y

    block = Fickle()
    checkpoint_blocks([block], Recompute.ELEMENTWISE)
    with pytest.raises(RuntimeError, match="calculated something else the second time"):
        block(torch.randn(3, 3, requires_grad=True)).sum().backward()


def test_without_a_graph_nothing_is_kept_and_nothing_is_run_twice() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return x * 2.0

    block = Counted()
    checkpoint_blocks([block], Recompute.ALL)
    with torch.no_grad():
        block(torch.ones(2, requires_grad=True))
    assert calls == [1]
