from __future__ import annotations

import torch

from library.train.scalar_reader import ScalarReader


def test_a_scalar_is_read_one_call_later_and_only_once() -> None:
    reader = ScalarReader()
    answers = [reader.exchange(torch.tensor(value)) for value in (1.0, 2.0, 3.0)]
    assert answers == [None, 1.0, 2.0]
    assert reader.last() == 3.0
    assert reader.last() is None
    assert reader.exchange(torch.tensor(5.0, dtype=torch.bfloat16)) is None
    assert reader.last() == 5.0


def test_a_loss_that_is_overwritten_later_has_been_copied() -> None:
    reader, loss = ScalarReader(), torch.tensor(1.0)
    reader.exchange(loss)
    loss.fill_(2.0)
    assert reader.exchange(loss) == 1.0
