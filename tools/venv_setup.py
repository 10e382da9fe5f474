"""How does a clone get its `.venv`, with the packages the requirement files name? Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 10), (3, 13)


class StepFailed(Exception):
    """A step of the set-up went wrong; the text says which step, what failed and what to do."""

    def __init__(self, step: str, problem: str, cure: str) -> None:
        super().__init__(f"\nStep '{step}' failed: {problem}\nWhat to do: {cure}")


def prepare_venv(requirements: Sequence[str], index_url: str | None = None) -> Path:
    """Make `.venv` if there is none, install the requirement files into it, and return its Python.

    torch is installed first and alone, from `index_url` if given, because the build (CPU, CUDA version) is chosen by
    the index. Files that have not changed since they were last installed are not installed again.
    """
    check_python()
    python = venv_python()
    if not python.exists():
        cure = "install Python's venv module (Debian, Ubuntu: apt install python3-venv), delete .venv and try again"
        run_step("make .venv", [sys.executable, "-m", "venv", str(VENV)], cure)
    stamp_file = VENV / "installed.json"
    wanted = {"index_url": index_url or "", **{name: _digest(ROOT / name) for name in requirements}}
    found = _read_stamp(stamp_file)
    if index_url is None:
        wanted["index_url"] = found.get("index_url", "")
    if all(found.get(name) == value for name, value in wanted.items()):
        return python
    _install_torch(python, index_url, other_index=wanted["index_url"] != found.get("index_url", ""))
    files = [argument for name in requirements for argument in ("-r", str(ROOT / name))]
    cure = "check the network connection and the disk space, then run the same command again; it goes on from here"
    run_step("install packages", [str(python), "-m", "pip", "install", *files], cure)
    stamp_file.write_text(json.dumps({**found, **wanted}, indent=1), encoding="utf-8")
    return python


def check_python() -> None:
    """StepFailed unless the running Python is one that the pinned packages support."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        running = ".".join(map(str, sys.version_info[:3]))
        raise StepFailed(
            "check Python",
            f"this is Python {running}; versions 3.{OLDEST[1]} to 3.{NEWEST[1]} are supported",
            f"install Python 3.{NEWEST[1]} and start this script with it",
        )


def venv_python() -> Path:
    """The interpreter of `.venv`, whether or not it exists yet."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_step(step: str, command: Sequence[str], cure: str, env: dict[str, str] | None = None) -> None:
    """Run `command` in the clone's root with its output shown; StepFailed names `step` and `cure` if it fails."""
    print(f"\n[{step}] {shown(command)}", flush=True)
    try:
        code = subprocess.call(list(command), cwd=ROOT, env=env)
    except OSError as error:
        raise StepFailed(step, str(error), cure) from error
    if code != 0:
        raise StepFailed(step, f"exit code {code} from: {shown(command)}", cure)


def shown(command: Sequence[str]) -> str:
    """`command` as one would type it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _install_torch(python: Path, index_url: str | None, other_index: bool) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pin = next(line.strip() for line in lines if line.startswith("torch=="))
    options = ["--index-url", index_url] if index_url else []
    # An installed torch of another build has the wanted version, so that pip would leave it.
    options += ["--force-reinstall"] if other_index else []
    cure = "check the network connection and the disk space; --index-url chooses another build of torch (see README.md)"
    run_step("install torch", [str(python), "-m", "pip", "install", *options, pin], cure)


def _digest(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return hashlib.sha256(f"{sys.version_info[:2]}\n{text}".encode()).hexdigest()


def _read_stamp(path: Path) -> dict[str, str]:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}
