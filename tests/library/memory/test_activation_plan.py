from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory.activation_plan import ActivationPlan, Cost, measured, plan_blocks
from library.memory.checkpointing import Checkpointed, Recompute
from tests.library.memory.toys import WIDTH, adapt, equal, saved_for_backward, small_model, steps

NOTHING, ELEMENTWISE, ALL = Recompute.NOTHING, Recompute.ELEMENTWISE, Recompute.ALL


def cost(everything: int, products: int, inputs: int = 10) -> Cost:
    return Cost({NOTHING: everything, ELEMENTWISE: products, ALL: inputs}, {NOTHING: 0.0, ELEMENTWISE: 1.0, ALL: 10.0})


def test_without_memory_everything_is_recomputed_and_with_enough_nothing() -> None:
    costs = [cost(100, 40)] * 4
    assert plan_blocks(costs, 0).choices == (ALL,) * 4
    plan = plan_blocks(costs, 10_000)
    assert plan.choices == (NOTHING,) * 4 and plan.effort == 0.0


def test_products_are_kept_first_since_they_save_most_for_their_bytes() -> None:
    plan = plan_blocks([cost(100, 40)] * 4, 280)
    assert plan.choices == (ELEMENTWISE,) * 4
    assert plan.kept <= 168 and plan.kept + plan.work <= 280
    assert plan.effort == pytest.approx(0.1)


def test_of_equal_blocks_the_last_keep_most() -> None:
    plan = plan_blocks([cost(100, 40)] * 4, 200)
    assert plan.choices == (ALL, ALL, ELEMENTWISE, ELEMENTWISE)


def test_a_block_does_only_what_it_is_allowed_to() -> None:
    allowed = [frozenset([ALL]), frozenset(Recompute)]
    assert plan_blocks([cost(100, 40)] * 2, 10_000, allowed).choices == (ALL, NOTHING)


@pytest.mark.parametrize("budget", [0, 300, 700, 1_500, 100_000])
def test_a_plan_stays_within_its_budget_unless_even_the_least_does_not_fit(budget: int) -> None:
    costs = [cost(100 + 10 * i, 40 + i) for i in range(9)]
    plan = plan_blocks(costs, budget)
    least = plan_blocks(costs, 0)
    assert plan.kept + plan.work <= max(budget, least.kept + least.work)


def test_what_a_block_keeps_is_measured_as_it_is() -> None:
    model = small_model(1)
    adapt(model.blocks)
    block = model.blocks[0]
    x, vec = torch.randn(2, 3, WIDTH, requires_grad=True), torch.randn(2, 3, WIDTH)
    found = measured(block.forward, (x, vec))
    frozen = {p.untyped_storage()._cdata for p in block.parameters()}

    def kept() -> int:
        tensors: dict[int, Tensor] = {}
        pack = torch.autograd.graph.saved_tensors_hooks(
            lambda t: tensors.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
        )
        with pack:
            block(x, vec)
        own = {p.untyped_storage()._cdata for p in adapters}
        given = {x.untyped_storage()._cdata, vec.untyped_storage()._cdata}
        return sum(t.untyped_storage().nbytes() for key, t in tensors.items() if key not in frozen | own | given)

    adapters = [p for value in block.modules() for p in getattr(value, "_held", (nn.Module(),))[0].parameters()]
    assert found.kept[NOTHING] == x.nbytes + kept()
    assert found.kept[ALL] == x.nbytes
    # Of each layer its answer and what lies between the thin matrices.
    rows = 2 * 3 * 4
    assert found.kept[ELEMENTWISE] == x.nbytes + rows * (2 * WIDTH + 2 + WIDTH + 2)
    assert found.effort[NOTHING] < found.effort[ELEMENTWISE] < found.effort[ALL]
    assert saved_for_backward(lambda: block(x, vec)) > 0


def test_the_first_pass_measures_and_the_next_follows_the_plan_without_changing_a_bit() -> None:
    plain = small_model(5)
    expected = steps(plain, adapt(plain.blocks))
    model = small_model(5)
    adapters = adapt(model.blocks)
    plan = ActivationPlan([block.forward for block in model.blocks], lambda needed: needed + 1500)
    for index, block in enumerate(model.blocks):
        block.forward = Checkpointed(block, lambda inputs, index=index: plan.choose(index, inputs))
    assert equal(steps(model, adapters), expected)
    (found,) = plan.plans.values()
    assert len(set(found.choices)) > 1


def test_measuring_leaves_nothing_behind_in_autocast() -> None:
    found = []
    for measures in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH)
        x = torch.randn(2, WIDTH, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            if measures:
                measured(layer.forward, (x,))
            y = layer(x)
        y.sum().backward()
        found.append([y.detach(), layer.weight.grad, x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_as_long_as_the_memory_is_not_known_everything_is_recomputed() -> None:
    plan = ActivationPlan([lambda x: x * 2.0], lambda needed: None)
    x = torch.randn(3, requires_grad=True)
    assert [plan.choose(0, (x,)) for _ in range(3)] == [ALL] * 3 and not plan.plans
