"""What is said before a run about its files and states is what it leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from demo_folder import DemoFolder
from library.flags.output import OutputFlags
from library.flags.settings import Settings
from library.train.disk_estimate import Kept, estimate_disk, free_disk, kept_files, kept_states
from library.train.state import ParameterGroups, Plan
from tests.clients.continuing import TinyRuns

PLAN = Plan.of(10, 1, 100, None)


@pytest.mark.parametrize(
    ("flags", "written", "stay"),
    [
        (OutputFlags(), 1, 1),
        (OutputFlags(save_every_n_steps=30), 4, 4),
        (OutputFlags(save_every_n_epochs=1), 10, 10),
        (OutputFlags(save_every_n_epochs=2, save_last_n_epochs=3), 5, 4),
        (OutputFlags(save_every_n_steps=10, save_last_n_steps=20), 11, 3),
        (OutputFlags(save_n_epoch_ratio=5), 5, 5),
    ],
)
def test_files_are_counted_before_they_are_written(flags: OutputFlags, written: int, stay: int) -> None:
    assert kept_files(flags, PLAN, 7, averages=False, validates=False) == Kept(written, stay, 7)
    assert kept_files(flags, PLAN, 7, averages=True, validates=True) == Kept(2 * written + 2, 2 * stay + 2, 7)
    assert kept_states(flags, PLAN, 7) == Kept(0, 0, 7)


@pytest.mark.parametrize(
    ("flags", "written", "stay"),
    [
        (OutputFlags(save_state_on_train_end=True, save_every_n_steps=30), 1, 1),
        (OutputFlags(save_state=True, save_every_n_steps=10, save_last_n_steps=20), 11, 3),
        (OutputFlags(save_state=True, save_every_n_steps=10, save_last_n_steps=20, save_last_n_steps_state=50), 11, 6),
        (OutputFlags(save_state=True, save_every_n_epochs=2, save_last_n_epochs_state=1), 5, 2),
    ],
)
def test_states_are_counted_before_they_are_written(flags: OutputFlags, written: int, stay: int) -> None:
    assert kept_states(flags, PLAN, 7) == Kept(written, stay, 7)


def test_the_disk_must_hold_one_file_and_one_state_more_than_stay() -> None:
    groups = ParameterGroups([{"params": [nn.Parameter(torch.zeros(1000, 1000))]}], ["a"])
    flags = OutputFlags(save_every_n_epochs=2, save_last_n_epochs=3, save_precision="fp16")
    estimate = estimate_disk(Settings.of(flags), PLAN, groups, validates=False)
    assert estimate.at_most == 5 * 2_000_000
    assert estimate.files.text() == "5, 2.0 MB each; 4 of them stay; 8.0 MB of disk"
    assert estimate.states.text() == "none"
    assert estimate_disk(Settings.of(), PLAN, groups, validates=True).at_most == 2 * 4_000_000


def test_the_free_disk_of_a_folder_that_is_not_there_is_that_of_its_parent(tmp_path: Path) -> None:
    assert free_disk(OutputFlags(output_dir=str(tmp_path / "a" / "b"))) > 1_000_000


def test_what_a_run_leaves_was_said_before(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    words = ("--max_train_steps", "4", "--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state")
    caplog.set_level("INFO")
    trainer = runs.train(
        "run", "--cache_latents", *words, "--ema_decay", "0.9", "--validation_split", "0.3", "--save_precision", "fp16"
    )
    folder = tmp_path / "run"
    said = estimate_disk(trainer.settings, trainer.plan, trainer.parameter_groups(), validates=True)
    assert re.search(r"states that will be written +5, 2\.\d MB each; 2 of them stay; 4\.\d MB of disk", caplog.text)
    files, states = list(folder.glob("*.safetensors")), list(folder.glob("*-state"))
    assert (len(files), len(states)) == (said.files.stay, said.states.stay) == (6, 2)
    for file in files:
        assert said.files.size < file.stat().st_size < said.files.size + 150_000  # names of tensors
    for state in states:
        size = sum(path.stat().st_size for path in state.iterdir())
        assert said.states.size < size < said.states.size + 600_000
