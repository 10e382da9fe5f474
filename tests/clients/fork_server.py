"""Runs that need a process of their own, without paying for its imports: a process that has them forks for each.

POSIX only.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("library.train.network_trainer", "library.models.sd.architecture")
"""What most of the runs need, and what takes long to import."""


class ForkServer:
    """Starts a function `package.module:name` of its arguments, or a script of the project as `python` would."""

    def __init__(self) -> None:
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUTF8": "1"}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.clients.fork_server"],
            cwd=ROOT,
            env=os.environ | own | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def start(self, target: str, *words: str, output: Path | None = None) -> int:
        """Start `target` with these arguments; its process. What it says goes to the end of `output`."""
        return self._ask({"target": target, "words": words, "output": str(output or os.devnull)})

    def wait(self, process: int) -> int:
        """The exit code of what was started; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._ask({"wait": process}))

    def run(self, target: str, *words: str) -> tuple[int, str]:
        """Start, wait, and answer with the exit code and all that was said."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output.txt"
            code = self.wait(self.start(target, *words, output=output))
            return code, output.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(300)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def child(target: str, words: list[str], output: str) -> int:
    """Become `target`; its exit code."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
        os.dup2(other, standard)
    sys.argv = [target, *words]
    try:
        if target.endswith(".py"):
            runpy.run_path(str(ROOT / target), run_name="__main__")
            return 0
        module, _, name = target.partition(":")
        return int(getattr(import_module(module), name)(*words) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    """Answer each request with a process or with the status that one ended with."""
    for module in IMPORTED:
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(child(**request))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
