from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import bench
from bench_rows import Row, Table, outcome


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_row_that_fails_says_why_in_a_word() -> None:
    assert outcome(python("print('first'); print('0.5 s')"), 60) == "0.5 s"
    memory = "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory. Tried to allocate 2 GiB')"
    assert outcome(python(memory), 60) == "does not fit"
    assert outcome(python("raise ValueError('no kernel for this | GPU')"), 60) == (
        "failed: ValueError: no kernel for this / GPU"
    )
    assert outcome(python("import time; time.sleep(60)"), 0.2) == "no answer within 0 s"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_row_that_the_system_ends_is_a_row() -> None:
    killed = outcome(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 60)
    assert killed.startswith("ended by signal 9")


def test_a_table_is_written_row_by_row_and_gone_on_with(tmp_path: Path) -> None:
    path, console = tmp_path / "table.md", io.StringIO()
    table = Table("commit abc", path, console)
    assert table.found == {}
    table.add(Row("a, 1 s", "does not fit"))
    assert path.read_text(encoding="utf-8") == console.getvalue()
    table.add(Row("b", "2", "3"))
    again = Table("commit abc", path, io.StringIO())
    assert again.found == {"a, 1 s": "does not fit", "b": "2"}
    again.add(Row("c", "4"))
    assert path.read_text(encoding="utf-8") == (
        "commit abc\n\n| measure | value | target |\n|---|---|---|\n"
        "| a, 1 s | does not fit |  |\n| b | 2 | 3 |\n| c | 4 |  |\n"
    )
    with pytest.raises(ValueError, match="is of commit abc, and this is commit def; name another file"):
        Table("commit def", path, io.StringIO())


def choice(found: dict[str, str]) -> bench.Choice:
    return bench.Choice(family="flux", size="small", device="cpu", steps=5, limit=60.0, found=found)


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": python("print('1')"), "b": python("raise SystemExit('no')"), "c": python("print('3')")}
    monkeypatch.setattr(bench, "of_variants", lambda words: iter(answers.items()))


@pytest.mark.usefixtures("three_rows")
def test_rows_that_the_file_has_are_not_measured_again_and_one_that_fails_does_not_end_the_table() -> None:
    assert list(bench.gpu(choice({"a": "0"}))) == [Row("b", "failed: no"), Row("c", "3")]


@pytest.mark.usefixtures("three_rows")
def test_adapters_that_differ_from_those_of_the_first_row_end_the_bench_with_their_names() -> None:
    found = bench.endurance(choice({"a": "3"}))
    with pytest.raises(SystemExit, match="not the adapters of the first row: b$"):
        assert list(found) == []


def test_a_model_at_full_size_must_be_named() -> None:
    nobody = bench.Choice(family=None, size="full", device="cuda", steps=None, limit=1.0, found={})
    with pytest.raises(SystemExit, match="gpu needs --family {sd,sdxl,flux}"):
        nobody.words("gpu", 10)
    assert choice({}).words("gpu", 10) == (
        *("gpu", "--family", "flux", "--size", "small", "--device", "cpu", "--steps", "5"),
    )
