"""Does everything pass? Makes `.venv` if needed, then runs ruff, mypy and pytest with the given pytest arguments.

pytest runs in several processes at once; `-n 0` among the arguments keeps it in one, as `--pdb` needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from venv_setup import ROOT, StepFailed, prepare_venv, shown

CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}
PROCESSES = min(os.cpu_count() or 1, 4)
"""Of pytest; each holds torch and small models, one to two GB."""
PYTEST = ["pytest", "-n", str(PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]


def main(pytest_arguments: Sequence[str]) -> int:
    """Run every check, also after one has failed; 0 if all passed. pytest comes last, so its summary is the end."""
    try:
        python = prepare_venv(["requirements.txt", "requirements-dev.txt"])
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    # Tests bring their own files; one that reached for the hub would pass or fail with the weather. One thread for each
    # process: small models gain nothing from more, and processes whose threads share cores wait for one another.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    codes: dict[str, int] = {}
    for name, arguments in {**CHECKS, "pytest": [*PYTEST, *pytest_arguments]}.items():
        if name == "pytest":
            print("".join(f"\n{done}: {'passed' if code == 0 else 'FAILED'}" for done, code in codes.items()))
        command = [str(python), "-m", *arguments]
        print(f"\n[{name}] {shown(command)}", flush=True)
        codes[name] = subprocess.call(command, cwd=ROOT, env=env)
    return next((code for code in codes.values() if code != 0), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
