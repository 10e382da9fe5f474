"""Forks a training run for each command line that it reads, so that the imports are paid once; POSIX only."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from tests.clients.training import SmallTrainer  # noqa: E402


def run(words: list[str]) -> int:
    """One run, in a process of its own; its messages go to standard error."""
    os.dup2(2, 1)
    return SmallTrainer(read_settings(TRAIN_NETWORK, "test", argv=words)).run()


def main() -> None:
    """Answer a command line with the process it runs in, and `wait` with its exit status."""
    child = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
            sys.stdout.flush()
            continue
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
