from __future__ import annotations

import logging
from pathlib import Path

from library.train.history import History, Series, warnings_kept


def test_a_short_curve_keeps_every_value() -> None:
    curve = Series(most=8)
    for step in range(1, 8):
        curve.add(step, float(step))
    assert [(p.step, p.mean) for p in curve.points] == [(step, float(step)) for step in range(1, 8)]


def test_a_long_curve_joins_neighbours_and_keeps_their_range() -> None:
    curve = Series(most=4)
    for step in range(1, 10):
        curve.add(step, float(step))
    assert [(p.step, p.mean, p.low, p.high) for p in curve.points] == [(4, 2.5, 1, 4), (8, 6.5, 5, 8), (9, 9, 9, 9)]


def test_a_very_long_curve_stays_small() -> None:
    curve = Series(most=100)
    for step in range(100_000):
        curve.add(step, 1.0)
    assert 50 <= len(curve.points) <= 101
    assert curve.points[-1].step == 99_999


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    curve = Series()
    for step, value in enumerate([1.0, float("nan"), 3.0], 1):
        curve.add(step, value)
    assert [(p.step, p.mean) for p in curve.points] == [(1, 1.0), (3, 3.0)]


def test_the_lines_of_a_log_bring_back_its_history() -> None:
    history = History()
    picture = {"path": "sample/a.png", "prompt": "a cat", "index": 1}
    history.replay(
        [
            {"step": 1, "epoch": 1, "time": 5.0, "loss/current": 0.5, "lr/unet": 1e-3},
            {"step": 2, "epoch": 1, "time": 6.0, "loss/current": None},
            {"step": 2, "epoch": 1, "time": 7.0, "table": "bins", "rows": [{"first": 0}]},
            {"step": 2, "epoch": 1, "time": 8.0, "event": "preview", "pictures": [picture]},
        ]
    )
    assert [(p.step, p.mean) for p in history.curves["loss/current"].points] == [(1, 0.5)]
    assert history.curves.keys() == {"loss/current", "lr/unet"}
    assert history.tables == {"bins": (2, [{"first": 0}])}
    (shown,) = history.pictures
    assert (shown.path, shown.prompt, shown.index, shown.step) == (Path("sample/a.png"), "a cat", 1, 2)


def test_warnings_are_kept_once_each_while_the_context_lasts() -> None:
    logger = logging.getLogger("a part of the program")
    with warnings_kept(["an earlier one"]) as messages:
        logger.warning("disk %s", "full")
        logger.warning("disk %s", "full")
        logger.info("all is well")
    logger.warning("too late")
    assert messages == ["an earlier one", "disk full"]
