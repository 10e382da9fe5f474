from __future__ import annotations

import json
import os
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.files.weights import save_safetensors
from library.flags.output import OutputFlags
from library.train.saving import Saver, Writer, snapshot

CASES = json.loads((Path(__file__).parents[2] / "facts/training/checkpoints.json").read_text(encoding="utf-8"))[
    "retention_cases"
]

# (unit, save_every, save_last_n) -> what stays in place of the recorded names: n steps are n steps, not n + 1.
MENDED = {
    ("step", 10, 30): ["m-step00000030", "m-step00000040", "m-step00000050", "m"],
    ("step", 10, 10): ["m-step00000050", "m"],
}


def text_writer(text: str = "x") -> Writer:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["save_last_n"] != 0], ids=lambda c: f"{c['unit']}-{c['save_last_n']}"
)
def test_the_files_that_stay_are_the_recorded_ones(case: dict[str, Any], tmp_path: Path) -> None:
    unit, every, keep = case["unit"], case["save_every"], case["save_last_n"]
    by_unit: dict[str, Any] = {f"save_every_n_{unit}s": every, f"save_last_n_{unit}s": keep}
    flags = OutputFlags(output_dir=str(tmp_path), output_name=case["output_name"], **by_unit)
    saver = Saver(flags, case["total"] if unit == "epoch" else 1, is_main_process=True)
    for number in range(1, case["total"] + 1):
        if unit == "step" and saver.due_at_step(number):
            saver.save_step({"": text_writer()}, number)
        if unit == "epoch" and saver.due_at_epoch(number):
            saver.save_epoch({"": text_writer()}, number)
    saver.save_last({"": text_writer()})
    saver.join()
    recorded = [name for name in case["left"] if name.endswith(".safetensors")]
    mended = MENDED.get((unit, every, keep))
    assert names(tmp_path) == sorted(recorded if mended is None else [f"{name}.safetensors" for name in mended])


# The same for states, by what --save_last_n_*_state says.
MENDED_STATES = {
    ("step", 10, 30, None): [30, 40, 50],
    ("step", 10, 10, 20): [40, 50],
    ("step", 10, None, 10): [30],
}


def state_writer(path: Path) -> None:
    path.mkdir()
    (path / "train_state.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["save_last_n"] != 0], ids=lambda c: f"{c['unit']}-{c['save_last_n_state']}"
)
def test_the_states_that_stay_are_the_recorded_ones(case: dict[str, Any], tmp_path: Path) -> None:
    unit, every, keep, keep_state = case["unit"], case["save_every"], case["save_last_n"], case["save_last_n_state"]
    by_unit: dict[str, Any] = {f"save_every_n_{unit}s": every, f"save_last_n_{unit}s": keep}
    by_unit[f"save_last_n_{unit}s_state"] = keep_state
    flags = OutputFlags(output_dir=str(tmp_path), output_name=case["output_name"], **by_unit)
    saver = Saver(flags, case["total"] if unit == "epoch" else 1, is_main_process=True)
    for number in range(1, case["total"] + 1):
        if unit == "step" and saver.due_at_step(number):
            saver.save_step_state(state_writer, number)
        if unit == "epoch" and saver.due_at_epoch(number):
            saver.save_epoch_state(state_writer, number)
    saver.save_last_state(state_writer)
    saver.join()
    recorded = [name for name in case["left"] if name.endswith("-state")]
    mended = MENDED_STATES.get((unit, every, keep, keep_state))
    if mended is not None:
        stems = (case["output_name"] or "at", case["output_name"] or "last")
        recorded = [*(f"{stems[0]}-step{step:08d}-state" for step in mended), f"{stems[1]}-state"]
    assert names(tmp_path) == sorted(recorded)


def test_the_moving_average_goes_with_its_network(tmp_path: Path) -> None:
    flags = OutputFlags(output_dir=str(tmp_path), output_name="m", save_every_n_steps=1, save_last_n_steps=1)
    saver = Saver(flags, 1, is_main_process=True)
    for step in (1, 2):
        saver.save_step({"": text_writer(), "-ema": text_writer()}, step)
    saver.save_last({"": text_writer(), "-ema": text_writer()})
    saver.join()
    assert names(tmp_path) == [
        "m-ema.safetensors",
        "m-step00000002-ema.safetensors",
        "m-step00000002.safetensors",
        "m.safetensors",
    ]


def test_a_file_that_fails_its_check_is_raised_without_waiting_for_the_next_save(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise ValueError(f"{path.name} holds an orphan")

    flags = OutputFlags(output_dir=str(tmp_path), output_name="m", save_every_n_steps=1)
    saver = Saver(flags, 1, is_main_process=True, check_file=refuse)
    saver.check()
    saver.save_step({"": text_writer()}, 1)
    wait(saver._running)
    with pytest.raises(ValueError, match=r"m-step00000001\.safetensors holds an orphan"):
        saver.check()


def test_a_ratio_spreads_its_number_of_files_over_the_epochs(tmp_path: Path) -> None:
    saver = Saver(OutputFlags(output_dir=str(tmp_path), save_n_epoch_ratio=4), 10, is_main_process=True)
    assert [epoch for epoch in range(1, 11) if saver.due_at_epoch(epoch)] == [2, 4, 6, 8]
    saver = Saver(OutputFlags(output_dir=str(tmp_path), save_n_epoch_ratio=20), 3, is_main_process=True)
    assert [epoch for epoch in range(1, 4) if saver.due_at_epoch(epoch)] == [1, 2]


def test_other_files_and_other_extensions_stay(tmp_path: Path) -> None:
    flags = OutputFlags(output_dir=str(tmp_path), output_name="m", save_every_n_steps=1, save_last_n_steps=1)
    (tmp_path / "m-step00000001.ckpt").write_text("other", encoding="utf-8")
    saver = Saver(flags, 1, is_main_process=True)
    for step in (1, 2, 3):
        saver.save_step({"": text_writer()}, step)
    saver.join()
    assert names(tmp_path) == ["m-step00000001.ckpt", "m-step00000003.safetensors"]


def test_the_extension_is_that_of_the_flags(tmp_path: Path) -> None:
    saver = Saver(OutputFlags(output_dir=str(tmp_path), save_model_as="pt"), 1, is_main_process=True)
    saver.save_last({"": text_writer()})
    saver.join()
    assert names(tmp_path) == ["last.pt"]


def test_every_save_is_said_with_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver(OutputFlags(output_dir=str(tmp_path / "new"), output_name="m"), 1, is_main_process=True)
    with caplog.at_level("INFO"):
        saver.save_last({"": text_writer()})
        saver.join()
    assert f"saving checkpoint: {tmp_path / 'new' / 'm.safetensors'}" in caplog.text
    assert (tmp_path / "new" / "m.safetensors").read_text(encoding="utf-8") == "x"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    flags = OutputFlags(output_dir=str(tmp_path), save_every_n_steps=1, save_every_n_epochs=1)
    saver = Saver(flags, 2, is_main_process=False)
    saver.save_last({"": text_writer()})
    saver.save_last_state(text_writer())
    saver.join()
    assert names(tmp_path) == []


def test_training_goes_on_while_a_file_is_written_and_does_not_change_it(tmp_path: Path) -> None:
    weights = nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in weights.state_dict().items()}
    may_write = threading.Event()
    taken = snapshot(weights.state_dict(), torch.float16)

    def write(path: Path) -> None:
        assert may_write.wait(10)
        save_safetensors(taken, path, {"ss_steps": "1"})

    saver = Saver(OutputFlags(output_dir=str(tmp_path), output_name="m"), 1, is_main_process=True)
    saver.save_last({"": write})
    with torch.no_grad():
        weights.weight.fill_(9.0)
    may_write.set()
    saver.join()
    expected = tmp_path / "expected.safetensors"
    save_safetensors({name: value.half() for name, value in before.items()}, expected, {"ss_steps": "1"})
    assert (tmp_path / "m.safetensors").read_bytes() == expected.read_bytes()


def test_a_failed_save_is_raised_by_the_next_and_its_predecessor_stays(tmp_path: Path) -> None:
    flags = OutputFlags(output_dir=str(tmp_path), output_name="m", save_every_n_steps=1, save_last_n_steps=1)
    saver = Saver(flags, 1, is_main_process=True)

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    saver.save_step({"": text_writer()}, 1)
    saver.save_step({"": full_disk}, 2)
    with pytest.raises(OSError, match="m-step00000002"):
        saver.save_step({"": text_writer()}, 3)
    assert names(tmp_path) == ["m-step00000001.safetensors"]
    saver.save_step({"": text_writer()}, 3)
    saver.join()


def test_a_failed_last_save_is_said_at_once_and_raised_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(OutputFlags(output_dir=str(tmp_path)), 1, is_main_process=True)

    def broken(path: Path) -> None:
        raise ValueError("cannot be written")

    saver.save_last({"": broken})
    with pytest.raises(ValueError, match="cannot be written"):
        saver.join()
    assert f"{tmp_path / 'last.safetensors'} could not be saved: cannot be written" in caplog.text


def test_saves_are_written_in_the_order_they_were_asked_for(tmp_path: Path) -> None:
    saver = Saver(OutputFlags(output_dir=str(tmp_path), output_name="m"), 1, is_main_process=True)
    for text in ("first", "second", "third"):
        saver.save_last({"": text_writer(text)})
    saver.join()
    assert (tmp_path / "m.safetensors").read_text(encoding="utf-8") == "third"


def test_a_snapshot_keeps_whole_numbers_and_casts_the_rest() -> None:
    tensors = {"a": torch.tensor([1.5, 2.5]), "n": torch.tensor([3])}
    taken = snapshot(tensors, torch.bfloat16)
    assert (taken["a"].dtype, taken["n"].dtype) == (torch.bfloat16, torch.int64)
    kept = snapshot(tensors, None)
    tensors["a"].fill_(0.0)
    assert kept["a"].tolist() == [1.5, 2.5]
    assert kept["a"].dtype == torch.float32


def test_no_folder_is_an_error() -> None:
    with pytest.raises(ValueError, match="--output_dir is needed"):
        Saver(OutputFlags(), 1, is_main_process=True)


def test_what_a_killed_run_began_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old = [tmp_path / f".m.0123456789ab.tmp{end}" for end in (".safetensors", "")]
    new = tmp_path / ".m.ba9876543210.tmp.safetensors"
    for file in (old[0], old[1] / "optimizer.bin", new, tmp_path / "m.safetensors"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for path in (*old, tmp_path / "m.safetensors"):
        os.utime(path, (0, 0))
    Saver(OutputFlags(output_dir=str(tmp_path)), 1, is_main_process=False)
    assert len(names(tmp_path)) == 4
    Saver(OutputFlags(output_dir=str(tmp_path)), 1, is_main_process=True)
    assert names(tmp_path) == [new.name, "m.safetensors"]
