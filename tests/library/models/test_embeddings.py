"""Timesteps become sinusoids, cosines first."""

import math

import torch

from library.models.embeddings import timestep_embedding


def test_cosines_come_first_and_periods_grow_to_ten_thousand() -> None:
    out = timestep_embedding(torch.tensor([0, 7]), 4)
    assert out.dtype == torch.float32
    slow = 7 * math.exp(-math.log(10000) / 2)
    expected = [[1, 1, 0, 0], [math.cos(7), math.cos(slow), math.sin(7), math.sin(slow)]]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float32))
