from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.flags.console import set_up_logging
from library.flags.output import LoggingFlags


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_first_process_reports_what_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    set_up_logging(LoggingFlags(), ["look here"])
    logging.getLogger("a").info("hello %d", 3)
    logging.getLogger("a").debug("unheard")
    error = capsys.readouterr().err
    assert "WARNING  look here" in error and "INFO     hello 3  (test_console.py:" in error
    assert "unheard" not in error


def test_other_processes_only_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    set_up_logging(
        LoggingFlags(console_log_file=str(tmp_path / "log.txt"), console_log_simple=True), ["said elsewhere"]
    )
    logging.getLogger("a").info("unheard")
    logging.getLogger("a").warning("trouble")
    assert capsys.readouterr().err == "trouble\n"
    assert not (tmp_path / "log.txt").exists()


def test_a_level_and_a_file_may_be_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "logs" / "log.txt"
    flags = LoggingFlags(console_log_level="DEBUG", console_log_file=str(path), console_log_simple=True)
    set_up_logging(flags)
    logging.getLogger("a").debug("猫")
    set_up_logging(flags)
    logging.getLogger("a").debug("again")
    assert path.read_text(encoding="utf-8") == "猫\nagain\n"
    assert capsys.readouterr().err == ""
