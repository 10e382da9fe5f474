from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.overrides import TorchFunctionMode

from library.flags.output import OutputFlags
from library.flags.settings import Settings
from library.train.ending import Ending
from library.train.history import Picture
from library.train.pace import Pace
from library.train.progress import MovingAverage, Progress, learning_rates
from library.train.state import Plan


class Recorder:
    """Stands for accelerate's processes and one tracker."""

    device = torch.device("cpu")
    num_processes = 2

    def __init__(self, directory: Path | None, is_main_process: bool = True) -> None:
        self.is_main_process = is_main_process
        self.directory = None if directory is None else str(directory)
        self.trackers = [SimpleNamespace(name="tensorboard")]
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def progress(recorder: Recorder, plan: Plan, names: tuple[str, ...] = ("unet",), first_step: int = 0) -> Progress:
    flags = OutputFlags(output_dir=recorder.directory, output_name="cats")
    return Progress(plan, names, cast(Accelerator, recorder), Settings.of(flags), first_step)


def log_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def run(shown: Progress, plan: Plan, losses: list[float], optimizer: torch.optim.Optimizer) -> None:
    """Batches as the trainer hands them over."""
    step = 0
    for epoch in range(1, plan.epochs + 1):
        shown.start_epoch(epoch)
        for index in range(plan.batches_per_epoch):
            shown.add_loss(torch.tensor(losses.pop(0)))
            if plan.completes_update(index):
                step += 1
                shown.finish_update(step, optimizer)
        shown.finish_epoch(epoch)
    shown.close(Ending())


def test_each_step_is_logged_under_its_own_number_with_its_loss_and_rates() -> None:
    recorder, plan = Recorder(None), Plan.of(2, 1, 4, None)
    run(progress(recorder, plan), plan, [1.0, 3.0, 5.0, 7.0], sgd(0.25))
    assert recorder.logged == [
        (1, {"loss/current": 1.0, "loss/average": 1.0, "lr/unet": 0.25}),
        (2, {"loss/current": 3.0, "loss/average": 2.0, "lr/unet": 0.25}),
        (2, {"loss/epoch_average": 2.0}),
        (3, {"loss/current": 5.0, "loss/average": 4.0, "lr/unet": 0.25}),
        (4, {"loss/current": 7.0, "loss/average": 6.0, "lr/unet": 0.25}),
        (4, {"loss/epoch_average": 6.0}),
    ]


def test_accumulated_batches_are_one_entry_with_their_mean() -> None:
    recorder, plan = Recorder(None), Plan.of(3, 2, 2, None)
    run(progress(recorder, plan), plan, [1.0, 3.0, 8.0], sgd(0.5))
    currents = [(step, values["loss/current"]) for step, values in recorder.logged if "loss/current" in values]
    assert currents == [(1, 2.0), (2, 8.0)]
    assert recorder.logged[-1] == (2, {"loss/epoch_average": 4.0})


def test_the_norm_of_the_gradient_stands_beside_the_loss_of_its_step() -> None:
    recorder, plan = Recorder(None), Plan.of(4, 2, 2, None)
    shown, optimizer = progress(recorder, plan), sgd(0.5)
    for step in (1, 2):
        for _ in range(2):
            shown.add_loss(torch.tensor(float(step)))
        shown.add_gradient(torch.tensor(10.0 * step))
        shown.finish_update(step, optimizer)
    shown.close(Ending())
    shown.close(Ending())
    assert [(step, values["loss/current"], values["norm/gradient"]) for step, values in recorder.logged] == [
        (1, 1.0, 10.0),
        (2, 2.0, 20.0),
    ]


def test_the_line_shows_steps_and_the_average_loss(capsys: pytest.CaptureFixture[str]) -> None:
    recorder, plan = Recorder(None), Plan.of(2, 1, 2, None)
    run(progress(recorder, plan), plan, [0.5, 0.25], sgd(0.5))
    line = capsys.readouterr().err.split("\r")[-1]
    assert line.startswith("steps: 100%")
    assert "2/2" in line
    assert "avr_loss=0.375" in line


def test_a_continued_run_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of(10, 1, 10, None)
    shown = Progress(plan, ["unet"], cast(Accelerator, Recorder(None)), Settings.of(), first_step=7)
    shown.close(Ending())
    assert "7/10" in capsys.readouterr().err


def test_only_the_main_process_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder, plan = Recorder(tmp_path, is_main_process=False), Plan.of(2, 1, 2, None)
    run(progress(recorder, plan), plan, [0.5, 0.25], sgd(0.5))
    assert recorder.logged == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_the_log_lies_beside_the_result_with_a_line_for_each_entry(tmp_path: Path) -> None:
    recorder, plan = Recorder(tmp_path), Plan.of(1, 1, 2, None)
    run(progress(recorder, plan), plan, [1.0, float("nan")], sgd(0.25))
    rows = log_rows(tmp_path / "cats.log.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 1), (1, 1), (2, 2), (2, 2), (2, 2)]
    assert (rows[0]["loss/current"], rows[0]["lr/unet"], rows[1]["loss/epoch_average"]) == (1.0, 0.25, 1.0)
    assert rows[2]["loss/current"] is None
    assert rows[0]["time"] <= rows[-1]["time"]


def test_tables_events_and_previews_are_lines_of_the_log(tmp_path: Path) -> None:
    shown = progress(Recorder(tmp_path), Plan.of(1, 1, 2, None))
    shown.start_epoch(1)
    shown.log_table("validation/bins", [{"first": 0, "last": 99, "loss": float("inf")}], step=1)
    shown.log_event("save", 1, path="cats.safetensors")
    shown.log_previews([Picture(Path("sample/a.png"), "a cat", 0)], step=2)
    shown.close(Ending())
    rows = log_rows(tmp_path / "cats.log.jsonl")
    for row in rows:
        row.pop("time")
    assert rows == [
        {"step": 1, "epoch": 1, "table": "validation/bins", "rows": [{"first": 0, "last": 99, "loss": None}]},
        {"step": 1, "epoch": 1, "event": "save", "path": "cats.safetensors"},
        {
            "step": 2,
            "epoch": 1,
            "event": "preview",
            "pictures": [{"path": "sample/a.png", "prompt": "a cat", "index": 0}],
        },
        {"step": 0, "epoch": 1, "event": "end", "text": "finished"},
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("the disk is full\nmake room"), "failed: the disk is full"),
        (KeyboardInterrupt(), "interrupted at once; what was learnt since the last saved file is lost"),
        (None, "finished"),
    ],
)
def test_the_log_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, text: str) -> None:
    shown = progress(Recorder(tmp_path), Plan.of(1, 1, 2, None))
    with contextlib.suppress(ValueError, KeyboardInterrupt), shown.until_closed():
        if error is not None:
            raise error
    assert [row["text"] for row in log_rows(tmp_path / "cats.log.jsonl")] == [text]


def test_a_continued_run_knows_what_was_logged_before(tmp_path: Path) -> None:
    plan = Plan.of(2, 1, 4, None)
    first = progress(Recorder(tmp_path), plan)
    run(first, Plan.of(2, 1, 2, None), [1.0, 3.0], sgd(0.5))
    again = progress(Recorder(tmp_path), plan, first_step=1)
    assert [(p.step, p.mean) for p in again.history.curves["loss/current"].points] == [(1, 1.0)]
    again.log({"loss/current": 9.0}, 2, 1)
    again.close(Ending())
    assert [row["step"] for row in log_rows(tmp_path / "cats.log.jsonl") if "loss/current" in row] == [1, 2, 2]


def test_every_tenth_update_says_how_fast_the_run_is_and_what_it_holds(tmp_path: Path) -> None:
    recorder, plan = Recorder(tmp_path), Plan.of(30, 1, 25, None)
    shown, optimizer = progress(recorder, plan), sgd(0.5)
    for step in range(1, 26):
        shown.add_batch(4, [torch.tensor([1, 999])])
        shown.add_loss(torch.tensor(1.0))
        shown.finish_update(step, optimizer)
    shown.finish_epoch(1)
    shown.close(Ending())
    told = {step: values for step, values in recorder.logged if "time/step" in values}
    assert list(told) == [10, 20, 25]
    for values in told.values():
        assert values["time/images_per_second"] == pytest.approx(4 * 2 / values["time/step"])  # two processes
        assert 0.01 < values["memory/process_gb"] < 100
    (table,) = [row for row in log_rows(tmp_path / "cats.log.jsonl") if row.get("table") == "timesteps"]
    counts = [row["count"] for row in table["rows"]]
    assert (counts[0], counts[-1], sum(counts)) == (25, 25, 50)


def test_the_time_of_previews_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("library.train.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    pace = Pace(torch.device("cpu"), 1)
    pace.add_images(1)
    with pace.aside():
        now[0] += 50
    now[0] += 5
    for _ in range(9):
        assert pace.finish_update() == {}
    assert pace.finish_update()["time/step"] == 0.5


def test_the_average_is_over_the_last_epochs_worth_of_batches() -> None:
    average = MovingAverage(3)
    seen = []
    for value in (3.0, 1.0, 2.0, 9.0, 1.0):
        average.add(value)
        seen.append(average.value)
    assert seen == pytest.approx([3.0, 2.0, 2.0, 4.0, 4.0])
    assert average.count == 3


def test_an_infinite_loss_leaves_the_average_with_its_batch() -> None:
    average = MovingAverage(2)
    for value in (float("inf"), 1.0, 2.0, 4.0, 6.0, 8.0):
        average.add(value)
    assert average.value == 7.0


def test_the_average_does_not_drift_over_a_long_run() -> None:
    average = MovingAverage(10)
    average.add(1e12)
    for _ in range(100):
        average.add(0.1)
    assert average.value == pytest.approx(0.1, rel=1e-12)


class ScalarReads(TorchFunctionMode):
    """Counts the calls that make the host wait for a tensor's value."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.tolist):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_no_value_of_a_tensor_is_asked_for_in_a_step() -> None:
    recorder, plan = Recorder(None), Plan.of(4, 1, 4, None)
    with ScalarReads() as reads:
        run(progress(recorder, plan), plan, [1.0, 2.0, 3.0, 4.0], sgd(0.25))
        assert reads.count == 0
        torch.tensor(1.0).item()
        assert reads.count == 1


def test_rates_carry_the_groups_names_and_the_estimate_of_optimizers_that_have_one() -> None:
    optimizer = sgd(0.5, 0.25)
    assert learning_rates(optimizer, ["text", "unet"]) == {"lr/text": 0.5, "lr/unet": 0.25}
    assert learning_rates(optimizer, ["text"]) == {"lr/text": 0.5, "lr/group1": 0.25}
    optimizer.param_groups[1]["d"] = 0.01
    assert learning_rates(optimizer, ["text", "unet"])["lr/d*lr/unet"] == 0.0025


def test_an_optimizer_without_a_rate_yet_logs_none() -> None:
    optimizer = sgd(0.5)
    optimizer.param_groups[0]["lr"] = None
    assert learning_rates(optimizer, ["unet"]) == {}
