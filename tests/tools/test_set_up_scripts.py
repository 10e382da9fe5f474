"""Do the scripts that make the environment run before it exists?"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import run_tests

ROOT = Path(__file__).resolve().parents[2]
BEFORE_THE_ENVIRONMENT = ["quickstart", "run_tests", "venv_setup"]


@pytest.mark.parametrize("script", BEFORE_THE_ENVIRONMENT)
def test_only_the_standard_library_is_imported(script: str) -> None:
    tree = ast.parse((ROOT / "tools" / f"{script}.py").read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    foreign = {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names | {"venv_setup"}}
    assert foreign == set()


@pytest.mark.parametrize("script", ["quickstart", "bench"])
def test_help_needs_nothing_installed(script: str) -> None:
    # -S: without site-packages
    command = [sys.executable, "-S", f"tools/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(("broken", "code"), [(None, 0), ("mypy", 3), ("pytest", 3)])
def test_all_checks_run_and_the_last_takes_the_arguments(
    monkeypatch: pytest.MonkeyPatch, broken: str | None, code: int
) -> None:
    taken: list[list[str]] = []

    def call(command: list[str], cwd: Path, env: dict[str, str]) -> int:
        taken.append(command[2:])
        assert (cwd, env["HF_HUB_OFFLINE"], env["OMP_NUM_THREADS"]) == (ROOT, "1", "1")
        return 3 if command[2] == broken else 0

    monkeypatch.setattr(run_tests, "prepare_venv", lambda names: Path("python"))
    monkeypatch.setattr(run_tests.subprocess, "call", call)
    assert run_tests.main(["tests/parity", "-x"]) == code
    assert [words[0] for words in taken] == ["ruff", "ruff", "mypy", "pytest"]
    assert taken[-1][-2:] == ["tests/parity", "-x"] and "-n" in taken[-1]


def test_every_pin_has_a_range_and_the_other_way_round() -> None:
    pins = names((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ranges = project.partition("\ndependencies = [")[2].partition("\n]")[0].replace('"', "").splitlines()
    assert pins == names(ranges)


def names(lines: list[str]) -> set[str]:
    """The packages in lines like `name==1.0; marker`."""
    found = set()
    for line in lines:
        text = line.strip().rstrip(",")
        if text and not text.startswith("#"):
            found.add(text.partition(";")[0].split("=")[0].split(">")[0].strip())
    return found
