from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.train import division
from library.train.division import Division
from library.train.resume import (
    Parts,
    check_division,
    move_schedule,
    read_past,
    restore,
    state_writer,
    trained_tensors,
)
from library.train.scheduler import NoSchedule
from library.train.state import Plan, TrainState


def parts_of(module: nn.Module, optimizer: Optimizer) -> Parts:
    return Parts([module], optimizer, NoSchedule(optimizer))


def saved(parts: Parts, folder: Path, finished: bool = False) -> Path:
    state_writer(parts, TrainState(epoch=2, step=5, micro_step=9, batch=3, epoch_start=4), 7, {"flags": {}}, finished)(
        folder
    )
    return folder


class FloatState(Optimizer):
    """Keeps float32 for bfloat16 parameters, as careful optimizers do."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for parameter in parameters:
            self.state[parameter]["sum"] = torch.full_like(parameter, 1 / 3, dtype=torch.float32)


def test_states_keep_the_dtype_that_their_optimizer_chose(tmp_path: Path) -> None:
    module = nn.Linear(3, 2).bfloat16()
    first = FloatState(list(module.parameters()))
    past = read_past(saved(parts_of(module, first), tmp_path / "m-state"))
    second = FloatState(list(module.parameters()))
    for entry in second.state.values():
        entry["sum"].zero_()
    restore(parts_of(module, second), past)
    assert all(torch.equal(entry["sum"], torch.full_like(entry["sum"], 1 / 3)) for entry in second.state.values())
    assert {entry["sum"].dtype for entry in second.state.values()} == {torch.float32}


def test_a_record_says_where_the_run_stood(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    past = read_past(saved(parts_of(module, SGD(module.parameters(), 0.1)), tmp_path / "m-state", finished=True))
    assert past.position == TrainState(epoch=2, step=5, micro_step=9, batch=3, epoch_start=4)
    assert (past.seed, past.finished, past.facts) == (7, True, {"flags": {}})


def test_a_state_is_taken_when_it_is_asked_for_not_when_it_is_written(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in trained_tensors([module]).items()}
    parts = parts_of(module, AdamW(module.parameters(), 0.1))
    write = state_writer(parts, TrainState(), 1, {}, False)
    with torch.no_grad():
        module.weight.fill_(9.0)
    write(tmp_path / "m-state")
    restore(parts, read_past(tmp_path / "m-state"))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained_tensors([module]).items())


def test_a_state_over_an_older_one_leaves_nothing_beside_it(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    parts = parts_of(module, SGD(module.parameters(), 0.1))
    for _ in range(2):
        saved(parts, tmp_path / "m-state")
    assert [path.name for path in tmp_path.iterdir()] == ["m-state"]


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    module = nn.Linear(2, 2)
    parts = parts_of(module, SGD(module.parameters(), 0.1))
    past = read_past(saved(parts, tmp_path / "m-state"))
    torch.save({"state": Evil()}, past.folder / "optimizer.bin")
    with pytest.raises(ValueError, match=r"--resume .*optimizer\.bin holds more than numbers"):
        restore(parts, past)
    assert not (tmp_path / "ran").exists()


def divided(rank: int, way: str = "--deepspeed --zero_stage=2", ranks: int = 2) -> Division:
    return Division(way, ranks, rank, torch.device("cpu"))


@pytest.fixture
def module_and_parts(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Linear, list[Parts]]:
    """A module and what each of two ranks holds, whose optimizers have states of their own."""
    module = nn.Linear(2, 2)
    parts = []
    for rank in (0, 1):
        optimizer = SGD(module.parameters(), 0.1, momentum=0.9)
        for parameter in module.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(rank + 1))
        parts.append(replace(parts_of(module, optimizer), division=divided(rank)))
    sent: list[Tensor] = []

    def to_first_rank(own: Tensor, device: torch.device) -> list[Tensor]:
        sent.insert(0, own.clone())  # the second rank goes first
        return sent if len(sent) == 2 else []

    monkeypatch.setattr(division, "to_first_rank", to_first_rank)
    return module, parts


def momenta(parts: Parts) -> set[float]:
    return {float(value) for state in parts.optimizer.state.values() for value in state["momentum_buffer"].flatten()}


def test_a_divided_state_is_one_folder_from_which_each_rank_takes_its_part(
    module_and_parts: tuple[nn.Linear, list[Parts]], tmp_path: Path
) -> None:
    module, (first, second) = module_and_parts
    saved(second, tmp_path / "m-state")
    assert not list(tmp_path.iterdir())
    past = read_past(saved(first, tmp_path / "m-state"))
    names = {path.name for path in past.folder.iterdir()}
    assert names == {"model.safetensors", "optimizer-1-of-2.bin", "optimizer-2-of-2.bin", "train_state.json"}
    for rank in (0, 1):
        fresh = replace(parts_of(module, SGD(module.parameters(), 0.1, momentum=0.9)), division=divided(rank))
        restore(fresh, past)
        assert momenta(fresh) == {float(rank + 1)}
    (past.folder / "optimizer-2-of-2.bin").unlink()
    with pytest.raises(ValueError, match=r"not a complete state: optimizer-2-of-2\.bin is missing"):
        read_past(past.folder)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (None, "is divided by --deepspeed --zero_stage=2 among 2 processes, and that of this run is whole"),
        (divided(0, ranks=1), "zero_stage=2 among 2 processes, and .* by --deepspeed --zero_stage=2 among 1 process:"),
        (divided(0, "--deepspeed --zero_stage=1"), "zero_stage=2 among 2 .* by --deepspeed --zero_stage=1 among 2 "),
    ],
)
def test_a_state_that_was_divided_otherwise_is_refused_with_both_ways(
    module_and_parts: tuple[nn.Linear, list[Parts]], tmp_path: Path, now: Division | None, said: str
) -> None:
    first, second = module_and_parts[1]
    saved(second, tmp_path / "m-state")
    past = read_past(saved(first, tmp_path / "m-state"))
    check_division(past, divided(1))
    with pytest.raises(ValueError, match=f"--resume .*m-state: the state of its optimizer .*{said}"):
        check_division(past, now)


def test_a_whole_state_is_refused_by_a_run_that_divides_its_own(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    past = read_past(saved(parts_of(module, SGD(module.parameters(), 0.1)), tmp_path / "m-state"))
    check_division(past, None)
    with pytest.raises(ValueError, match=r"is whole, and that of this run is divided by --deepspeed --zero_stage=2"):
        check_division(past, divided(0))


def test_a_state_of_another_program_is_named_with_the_way_to_use_it(tmp_path: Path) -> None:
    for name in ("model.safetensors", "optimizer.bin"):
        (tmp_path / name).touch()
    (tmp_path / "train_state.json").write_text('{"current_epoch": 3, "current_step": 250}', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"another program.*--network_weights .*model\.safetensors.*--initial_step 250"
    ):
        read_past(tmp_path)


def test_a_function_of_the_step_moves_to_any_step() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    move_schedule(schedule, optimizer, 4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 6)


def test_a_step_has_one_place_in_the_epochs() -> None:
    plan = Plan.of(batches_per_epoch=7, accumulation=2, max_steps=20, max_epochs=None)
    assert plan.position(0) == TrainState()
    assert plan.position(3) == TrainState(epoch=1, step=3, micro_step=6, batch=6, epoch_start=0)
    assert plan.position(4) == TrainState(epoch=1, step=4, micro_step=7, batch=0, epoch_start=4)
    assert plan.position(5) == TrainState(epoch=2, step=5, micro_step=9, batch=2, epoch_start=4)


def test_an_optimizer_of_other_groups_is_refused_with_the_flags_that_make_them(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    past = read_past(saved(parts_of(module, SGD(module.parameters(), 0.1)), tmp_path / "m-state"))
    other = SGD([{"params": [parameter]} for parameter in module.parameters()], 0.1)
    with pytest.raises(ValueError, match=r"--resume .* groups of 2 tensors, and that of this run of 1, 1: --deepspeed"):
        restore(parts_of(module, other), past)
