"""Is the environment made once, torch first, and does a failure say what to do?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import venv_setup
from venv_setup import StepFailed, check_python, prepare_venv, run_step, venv_python

Steps = list[tuple[str, list[str]]]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What would have been run in a clone at `tmp_path`."""
    taken: Steps = []

    def record(step: str, command: Sequence[str], cure: str, env: dict[str, str] | None = None) -> None:
        taken.append((step, [str(word) for word in command]))
        if step == "make .venv":
            venv_python().parent.mkdir(parents=True)
            venv_python().touch()

    monkeypatch.setattr(venv_setup, "ROOT", tmp_path)
    monkeypatch.setattr(venv_setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(venv_setup, "run_step", record)
    (tmp_path / "requirements.txt").write_text("# pins\ntorch==2.13.0\neinops==0.8.2\n", encoding="utf-8")
    (tmp_path / "requirements-dev.txt").write_text("ruff\n", encoding="utf-8")
    return taken


def test_torch_comes_first_and_alone(steps: Steps) -> None:
    prepare_venv(["requirements.txt"])
    assert [step for step, _ in steps] == ["make .venv", "install torch", "install packages"]
    assert steps[1][1][-2:] == ["install", "torch==2.13.0"]


def test_nothing_is_installed_twice(steps: Steps) -> None:
    prepare_venv(["requirements.txt"])
    steps.clear()
    prepare_venv(["requirements.txt"])
    assert steps == []
    prepare_venv(["requirements.txt", "requirements-dev.txt"])
    assert [step for step, _ in steps] == ["install torch", "install packages"]


def test_a_changed_file_is_installed_again(steps: Steps, tmp_path: Path) -> None:
    prepare_venv(["requirements.txt"])
    steps.clear()
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\neinops==0.9.0\n", encoding="utf-8")
    prepare_venv(["requirements.txt"])
    assert [step for step, _ in steps] == ["install torch", "install packages"]


def test_another_index_replaces_torch_and_is_remembered(steps: Steps) -> None:
    prepare_venv(["requirements.txt"])
    steps.clear()
    prepare_venv(["requirements.txt"], "https://example.org/cu128")
    options = ["--index-url", "https://example.org/cu128", "--force-reinstall", "torch==2.13.0"]
    assert steps[0][1][-4:] == options
    steps.clear()
    prepare_venv(["requirements.txt"])
    assert steps == []


def test_a_failing_step_names_itself_and_its_cure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StepFailed) as failure:
        run_step("count to three", [sys.executable, "-c", "raise SystemExit(3)"], "learn to count")
    message = str(failure.value)
    assert "Step 'count to three' failed: exit code 3" in message
    assert message.endswith("What to do: learn to count")
    assert "[count to three]" in capfd.readouterr().out


def test_a_program_that_is_not_there_is_a_failed_step() -> None:
    with pytest.raises(StepFailed, match="What to do: install it"):
        run_step("go", ["no-such-program-anywhere"], "install it")


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 14, 0)])
def test_an_unsupported_python_is_told_so(version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(StepFailed, match=r"versions 3\.10 to 3\.13 are supported"):
        check_python()
