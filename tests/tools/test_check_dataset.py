"""The dataset doctor as a program: what it prints and writes, and its exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import check_dataset
from demo_folder import DemoFolder

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/check_dataset.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=ROOT)


def test_a_good_dataset_gives_zero_and_its_numbers(small_sd: DemoFolder, tmp_path: Path) -> None:
    page, table = tmp_path / "page.html", tmp_path / "table.json"
    exact = ("--tokenizer_cache_dir", small_sd.tokenizers, "--max_train_epochs", "3")
    done = run(small_sd.dataset, *exact, "--html", page, "--json", table)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 batches and 12 steps an epoch; 36 steps in 3 epochs" in done.stdout
    assert "Nothing here will hurt" in done.stdout and "estimated" not in done.stdout
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found["hurts"] is False and found["findings"] == []
    assert page.read_text(encoding="utf-8").count("<figure>") == 12


def test_what_hurts_gives_three_and_folders_of_the_command_line_are_read(small_sd: DemoFolder, tmp_path: Path) -> None:
    folder = tmp_path / "5_circle"
    folder.mkdir()
    for path in sorted(small_sd.pictures.iterdir())[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    done = run("--train_data_dir", tmp_path, "--resolution", "512", "--json", "-")
    assert done.returncode == 3
    table = json.loads(done.stdout)
    kinds = {finding["kind"] for finding in table["findings"]}
    assert "tiny" in kinds and table["datasets"][0]["subsets"][0]["num_repeats"] == 5


def test_a_file_that_cannot_be_read_gives_one_and_one_message(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_text("[[datasets]]\nresolutoin = 5\n", encoding="utf-8")
    done = run(path)
    assert done.returncode == 1 and done.stdout == ""
    assert str(path) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [(), ("--json", "-")])
def test_names_that_the_encoding_of_the_output_does_not_have_are_printed_as_escapes(
    small_sd: DemoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    folder = tmp_path / "2_猫"
    folder.mkdir()
    picture = next(small_sd.pictures.glob("*.png"))
    (folder / "猫 😀.png").write_bytes(picture.read_bytes())
    (folder / "猫 😀.txt").write_text("猫", encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    check_dataset.main(["--train_data_dir", str(tmp_path), "--resolution", "64", *more])
    sys.stdout.flush()
    text = written.getvalue().decode("cp1252")
    assert "2_\\u732b" in text
    if more:
        assert "2_猫" in str(json.loads(text)["datasets"][0]["subsets"][0])
