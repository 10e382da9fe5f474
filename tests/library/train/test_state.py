"""How long a run is."""

import pytest

from library.train.state import Plan

EXAMPLES = [  # batches of all processes, accumulation, processes, epochs asked for, steps, updates per epoch, epochs
    (10, 1, 1, 3, 30, 10, 3),
    (10, 4, 1, 3, 9, 3, 3),
    (10, 4, 1, None, 10, 3, 4),
    (7, 2, 2, 2, 4, 2, 2),
    (100, 1, 1, None, 250, 100, 3),
]


@pytest.mark.parametrize(("batches", "accumulation", "processes", "asked", "steps", "updates", "epochs"), EXAMPLES)
def test_epochs_and_steps_follow_from_each_other(batches, accumulation, processes, asked, steps, updates, epochs):
    plan = Plan.of(-(-batches // processes), accumulation, max_steps=1600 if asked else steps, max_epochs=asked)
    assert (plan.steps, plan.updates_per_epoch, plan.epochs) == (steps, updates, epochs)


def test_the_last_batch_of_an_epoch_completes_a_short_update():
    plan = Plan.of(batches_per_epoch=5, accumulation=2, max_steps=100, max_epochs=1)
    assert [plan.completes_update(i) for i in range(5)] == [False, True, False, True, True]
