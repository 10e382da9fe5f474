"""Which ranks have something to do when weights and states are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from library.flags.output import OutputFlags
from library.train.interruption import Request
from library.train.keeping import Keeping
from library.train.saving import Saver, Writer
from library.train.state import TrainState


class Rank:
    """One process of a run of two epochs of two steps, which saves after every step and is interrupted in the end."""

    def __init__(self, folder: Path, is_first: bool, divided: bool) -> None:
        self.states: list[tuple[int, bool]] = []
        self.weights: list[int] = []
        flags = OutputFlags(
            output_dir=str(folder), output_name="m", save_every_n_steps=2, save_every_n_epochs=1, save_state=True
        )
        self.position = TrainState(epoch=1)
        updates = cast(Any, SimpleNamespace(average=None, optimizer=SimpleNamespace(optimizer=None)))
        watch = cast(Any, SimpleNamespace(refuse_broken_weights=lambda: None))
        self.saver = Saver(flags, 2, is_first)
        parts = (self.position, updates, watch, self.take_weights, self.take_state)
        self.keeping = Keeping(flags, self.saver, *parts, divided=divided)

    def take_weights(self, step: int, epoch: int) -> Writer:
        self.weights.append(step)
        return lambda path: path.write_text("weights", encoding="utf-8") and None

    def take_state(self, finished: bool) -> Writer:
        self.states.append((self.position.step, finished))
        return Path.mkdir

    def run(self) -> None:
        for step in (1, 2, 3):
            self.position.step = step
            self.keeping.after_step(Request.INTERRUPT if step == 3 else Request.NOTHING)
            if step == 2 and self.keeping.after_epoch():
                self.keeping.between_epochs()
        self.keeping.best(1)
        self.keeping.last()
        self.saver.close()


@pytest.mark.parametrize("divided", [True, False])
def test_all_ranks_take_part_in_every_state_that_is_divided_and_the_first_one_writes(
    tmp_path: Path, divided: bool
) -> None:
    first, second = Rank(tmp_path / "first", True, divided), Rank(tmp_path / "second", False, divided)
    first.run()
    second.run()
    assert first.states == [(2, False), (2, False), (3, False), (3, True)]
    assert second.states == (first.states if divided else [])
    assert first.weights == [2, 2, 3, 3, 3] and second.weights == []
    states = [path.name for path in sorted((tmp_path / "first").glob("*-state"))]
    assert states == ["m-000001-state", "m-state", "m-step00000002-state", "m-step00000003-state"]
    assert not (tmp_path / "second").exists()
