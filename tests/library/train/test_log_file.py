from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.flags.output import OutputFlags
from library.train.log_file import LogFile, log_path, read_log


def lines(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("epoch", "time")} for row in rows]


def write(path: Path, steps: list[int], first_step: int = 0) -> None:
    file = LogFile(path, first_step)
    for step in steps:
        file.write({"loss/current": float(step)}, step, 1)
    file.close()


def test_the_log_is_named_like_the_result() -> None:
    assert log_path(OutputFlags(output_dir="out", output_name="cats")) == Path("out/cats.log.jsonl")
    assert log_path(OutputFlags(output_dir="out")) == Path("out/last.log.jsonl")
    assert log_path(OutputFlags()) is None


def test_no_folder_means_no_log_file() -> None:
    file = LogFile(None)
    file.write({"loss/current": 1.0}, 1, 1)
    file.close()
    assert file.path is None


def test_what_is_not_finite_is_null_at_every_depth(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log.jsonl")
    file.write({"x": float("inf"), "rows": [{"loss": float("nan"), "name": "ä"}], "list": [1.5, -float("inf")]}, 1, 1)
    file.close()
    assert lines(tmp_path / "a.log.jsonl") == [
        {"step": 1, "x": None, "rows": [{"loss": None, "name": "ä"}], "list": [1.5, None]}
    ]


def test_a_run_that_starts_anew_keeps_the_log_before_it_aside(tmp_path: Path) -> None:
    path = tmp_path / "cats.log.jsonl"
    write(path, [1, 2])
    write(path, [1])
    assert [row["step"] for row in lines(path)] == [1]
    assert [row["step"] for row in lines(tmp_path / "cats.log.previous.jsonl")] == [1, 2]


def test_a_continued_run_goes_on_in_the_same_file_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "cats.log.jsonl"
    write(path, [1, 2, 3])
    write(path, [3, 4], first_step=2)
    assert lines(path)[3] == {"step": 2, "event": "resume"}
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 2, 3, 4]
    assert not (tmp_path / "cats.log.previous.jsonl").exists()


def test_reading_leaves_out_what_was_done_again(tmp_path: Path) -> None:
    path = tmp_path / "cats.log.jsonl"
    write(path, [1, 2, 3])
    write(path, [3, 4, 5], first_step=2)
    read = [row["step"] for row in read_log(path, before=4) if "loss/current" in row]
    assert read == [1, 2, 3, 4]


def test_reading_takes_a_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    path = tmp_path / "cats.log.jsonl"
    write(path, [1, 2])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss/cu')
    assert [row["step"] for row in read_log(path, before=9)] == [1, 2]
    assert list(read_log(tmp_path / "none.jsonl", before=9)) == []


def test_a_log_that_cannot_be_written_any_more_is_one_warning_and_not_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        close = flush = lambda self: self.write("")

    file = LogFile(tmp_path / "a.log.jsonl")
    file.write({"loss/current": 1.0}, 1, 1)
    file._file = Full()  # type: ignore[assignment]
    for step in (2, 3):
        file.write({"loss/current": 1.0}, step, 1)
    file.close()
    assert [
        message for message in caplog.messages if "a.log.jsonl is not written any more" in message
    ] == caplog.messages
    assert [row["step"] for row in lines(tmp_path / "a.log.jsonl")] == [1]
