"""Small runs that are stopped and continued, and the comparison of what they end with."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demo_folder import DemoFolder
from library.files.weights import open_weights
from tests.clients.training import SmallTrainer, small_settings, train

TINY = """\
[general]
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.3
caption_tag_dropout_rate = 0.2
flip_aug = true

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{pictures}"
"""


@dataclass(frozen=True)
class TinyRuns:
    """Runs of about a second on pictures of 64 x 64, six batches an epoch."""

    demo: DemoFolder
    root: Path

    @property
    def dataset(self) -> Path:
        """The dataset file."""
        path = self.root / "tiny.toml"
        if not path.exists():
            path.write_text(TINY.format(pictures=self.demo.pictures.as_posix()), encoding="utf-8")
        return path

    def words(self, *words: str) -> list[str]:
        """The command line that all runs share, with `words` at its end."""
        return ["--dataset_config", str(self.dataset), *words]

    def train(self, name: str, *words: str) -> SmallTrainer:
        """A run that comes to its end, in this process; its files lie in `root/name`."""
        return train(self.demo, self.root / name, *self.words(*words))

    def signalled(self, name: str, number: signal.Signals, step: int, *words: str) -> int:
        """The exit code of a run that gets signal `number` in the middle of the step after `step`."""

        class Signalled(SmallTrainer):
            def update(self) -> None:
                if self.state.step == step:
                    signal.raise_signal(number)
                super().update()

        return Signalled(small_settings(self.demo, self.root / name, *self.words(*words))).run()

    def state(self, name: str, stem: str = "small") -> str:
        """The state folder `stem` of run `name`."""
        return str(self.root / name / f"{stem}-state")

    def weights(self, name: str, stem: str = "small") -> dict[str, Tensor]:
        """The file `stem` of run `name`."""
        return tensors(self.root / name / f"{stem}.safetensors")

    def names(self, name: str) -> list[str]:
        """Networks and states of a run."""
        ends = (".safetensors", "-state")
        return sorted(path.name for path in (self.root / name).iterdir() if path.name.endswith(ends))


def tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a weights file."""
    with open_weights(path) as file:
        return {key: file.read(key) for key in file.keys()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two files hold the same bits, and something was trained."""
    assert any(key.endswith("lora_up.weight") and value.abs().max() > 0 for key, value in first.items())
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
