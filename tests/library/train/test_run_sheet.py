from __future__ import annotations

from pathlib import Path

import pytest

from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import LoggingFlags, OutputFlags
from library.flags.settings import Settings
from library.train.run_sheet import (
    WIDTH,
    Table,
    file_counts,
    files_text,
    free_disk,
    needed_disk,
    settings_tables,
    settings_text,
)
from library.train.state import Plan


def test_a_table_keeps_its_columns_and_wraps_the_last() -> None:
    table = Table("things", ("a", "b"), (("short", "x"), ("much longer", "word " * 40)))
    lines = table.text().splitlines()
    assert lines[:2] == ["things", "  short        x"]
    assert len(lines) == 5 and max(map(len, lines)) <= WIDTH
    assert lines[3].startswith(" " * 15 + "word")


def test_settings_that_differ_from_the_default_are_marked_and_what_is_off_is_left_out() -> None:
    settings = Settings.of(OptimizerFlags(learning_rate=1e-4), NetworkFlags(network_dim=8))
    tables = {table.title: table for table in settings_tables(settings)}
    optimizer = tables["Optimizer"]
    rows = {row[0]: (row[1], i in optimizer.marked) for i, row in enumerate(optimizer.rows)}
    assert rows == {"learning_rate": ("0.0001", True), "max_grad_norm": ("1", False)}
    text = settings_text(settings)
    assert "*learning_rate=0.0001  max_grad_norm=1" in text and "unet_lr" not in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_secrets_are_not_shown() -> None:
    text = settings_text(Settings.of(LoggingFlags(wandb_api_key="abc123")))
    assert "wandb_api_key=(hidden)" in text and "abc123" not in text


def test_a_value_with_blanks_stays_in_one_piece() -> None:
    settings = Settings.of(OptimizerFlags(optimizer_args=("weight_decay=0.1", "betas=0.9,0.99")))
    assert "*optimizer_args=weight_decay=0.1 betas=0.9,0.99" in settings_text(settings)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (OutputFlags(), (1, 1)),
        (OutputFlags(save_every_n_steps=30), (4, 4)),
        (OutputFlags(save_every_n_epochs=1), (10, 10)),
        (OutputFlags(save_every_n_epochs=2, save_last_n_epochs=3), (5, 4)),
        (OutputFlags(save_every_n_steps=10, save_last_n_steps=20), (11, 3)),
        (OutputFlags(save_n_epoch_ratio=5), (5, 5)),
    ],
)
def test_files_are_counted_before_they_are_written(flags: OutputFlags, expected: tuple[int, int]) -> None:
    plan = Plan.of(10, 1, 100, None)
    assert file_counts(plan, flags) == expected


def test_the_disk_must_hold_one_file_more_than_stays() -> None:
    plan = Plan.of(10, 1, 100, None)
    flags = OutputFlags(save_every_n_epochs=2, save_last_n_epochs=3, save_precision="fp16")
    assert needed_disk(plan, flags, 1_000_000) == 5 * 2_000_000
    assert needed_disk(plan, OutputFlags(), 1_000_000) == 4_000_000
    text = files_text(plan, flags, 1_000_000)
    assert text.startswith("5, 2.0 MB each; 4 of them stay; 8.0 MB of disk, ")


def test_the_free_disk_of_a_folder_that_is_not_there_is_that_of_its_parent(tmp_path: Path) -> None:
    assert free_disk(OutputFlags(output_dir=str(tmp_path / "a" / "b"))) > 1_000_000
