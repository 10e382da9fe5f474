"""Do parts of the common interface keep rows together?"""

from __future__ import annotations

import torch

from library.models.architecture import Condition


def test_two_conditions_become_one_batch_and_its_rows_are_them_again() -> None:
    first = Condition({"a": torch.zeros(2, 3)}, torch.zeros(2, 6), torch.zeros(2))
    second = Condition({"a": torch.ones(1, 3)}, torch.ones(1, 6), torch.ones(1))
    both = first.followed_by(second)
    assert both.text["a"].shape == (3, 3) and both.sizes is not None and both.guidance is not None
    last = both.rows([2])
    assert torch.equal(last.text["a"], second.text["a"])
    assert last.sizes is not None and last.sizes.tolist() == [[1] * 6]
    assert last.guidance is not None and last.guidance.tolist() == [1]


def test_what_a_family_does_not_tell_stays_untold() -> None:
    both = Condition({"a": torch.zeros(1, 3)}).followed_by(Condition({"a": torch.zeros(1, 3)}))
    assert both.sizes is None and both.guidance is None
