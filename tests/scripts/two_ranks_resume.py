"""Trains to the end, again from a state, and again after one rank was interrupted; started by several processes."""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from library.flags.settings import read_settings  # noqa: E402
from library.flags.trainers import TRAIN_NETWORK  # noqa: E402
from library.models.sd.architecture import StableDiffusion  # noqa: E402
from library.train.network_trainer import NetworkTrainer  # noqa: E402


class Trainer(NetworkTrainer):
    """As train_network.py's; `hears` is the signal that this rank gets in the middle of its second step."""

    architecture = StableDiffusion
    hears: signal.Signals | None = None

    def start(self) -> None:
        """The end of a run would take the process group away, which the next one needs."""
        super().start()
        self.accelerator.end_training = self.accelerator.wait_for_everyone

    def update(self) -> None:
        """As ever, with the signal before it."""
        if self.hears is not None and self.state.step == 1:
            signal.raise_signal(self.hears)
        super().update()


def run(words: list[str], output: Path, *more: str, hears: signal.Signals | None = None) -> int:
    """The exit code of a run that writes to `output`."""
    trainer = Trainer(read_settings(TRAIN_NETWORK, "test", argv=[*words, "--output_dir", str(output), *more]))
    trainer.hears = hears
    return trainer.run()


def runs_of(folder: Path, number: str, rank: str, words: list[str]) -> bool:
    """Whether the four runs of a case ended as they should; `rank` is the one that gets the signal `number`."""
    heard = signal.Signals[number] if os.environ["RANK"] == rank else None
    codes = [run(words, folder / "whole"), run(words, folder / "stopped", hears=heard) - 130]
    for name, state in (("whole", "step00000002"), ("stopped", "step00000003")):
        codes.append(run(words, folder / f"{name}_resumed", "--resume", str(folder / name / f"small-{state}-state")))
    return not any(codes)


def main() -> int:
    """`FILE`, a list of cases in JSON, each `[folder, SIGNAL, RANK, words...]`: 0 when all ended as they should."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return 0 if all(runs_of(Path(folder), number, rank, words) for folder, number, rank, *words in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
