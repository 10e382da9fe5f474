"""Do the scripts that make the environment run before it exists?"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
