from __future__ import annotations

from library.flags.network import NetworkFlags
from library.flags.optimizer import OptimizerFlags
from library.flags.output import LoggingFlags
from library.flags.settings import Settings
from library.train.run_sheet import (
    WIDTH,
    Table,
    settings_tables,
    settings_text,
)


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
