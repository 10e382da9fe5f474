"""Processes as they are before accelerate has seen any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state in globals."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
