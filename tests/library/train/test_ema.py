from __future__ import annotations

import pytest
import torch

from library.train.ema import MovingWeights


def test_the_average_follows_with_a_share_that_grows_to_its_decay() -> None:
    value = torch.zeros(2)
    moving = MovingWeights([value], decay=0.25)
    value.fill_(11.0)
    moving.update()  # (1 + 1) / (10 + 1) of the old: 0 * 2/11 + 11 * 9/11
    torch.testing.assert_close(moving.averages[0], torch.full((2,), 9.0))
    value.fill_(1.0)
    moving.update()  # 3/12 = 0.25
    torch.testing.assert_close(moving.averages[0], torch.full((2,), 3.0))
    value.fill_(5.0)
    moving.update()  # 4/13 is more than 0.25
    torch.testing.assert_close(moving.averages[0], torch.full((2,), 4.5))


def test_in_place_the_weights_are_the_average_and_afterwards_what_they_were() -> None:
    value = torch.tensor([0.1, 0.2])
    view = value[:1]
    moving = MovingWeights([value], decay=0.5)
    with torch.no_grad():
        value.add_(1.0)
    before = value.clone()
    with pytest.raises(RuntimeError), moving.in_place():
        assert view.item() == pytest.approx(0.1)
        raise RuntimeError
    assert torch.equal(value, before)


def test_a_saved_average_goes_on_and_one_of_other_weights_is_refused() -> None:
    value = torch.tensor([1.0, 2.0, 3.0])
    first, second = MovingWeights([value], 0.9), MovingWeights([value], 0.9)
    value.mul_(2)
    first.update()
    second.load_state(first.state())
    value.mul_(2)
    for moving in (first, second):
        moving.update()
    assert torch.equal(first.averages[0], second.averages[0]) and second.updates == 2
    with pytest.raises(ValueError, match="1 tensors with 3 numbers, where the run has 1 with 2"):
        MovingWeights([torch.zeros(2)], 0.9).load_state(first.state())


def test_an_average_of_many_tensors_goes_on_from_a_file_that_sorts_them_by_name() -> None:
    values = [torch.full((number + 1,), float(number)) for number in range(12)]
    state = MovingWeights(values, 0.9).state()
    moving = MovingWeights([torch.zeros_like(value) for value in values], 0.9)
    moving.load_state(dict(sorted(state.items())))
    assert all(torch.equal(average, value) for average, value in zip(moving.averages, values, strict=True))
