"""Runs train_db.py in this process on the small model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from demo_folder import DemoFolder
from library.flags.dreambooth import DB_ABSENT, DB_CHOICES, DB_DEFAULTS, DB_IDLE, DB_RULES, TRAIN_DB
from library.flags.settings import Settings, read_settings
from library.models.sd.architecture import StableDiffusion
from library.train.dreambooth_trainer import DreamBoothTrainer
from tests.clients.continuing import tensors

CONFIG = """\
[general]
caption_extension = ".txt"
shuffle_caption = true
caption_tag_dropout_rate = 0.2

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{pictures}"
  {more}
"""


class SmallModelTrainer(DreamBoothTrainer):
    """As train_db.py's."""

    architecture = StableDiffusion


def db_settings(*words: str) -> Settings:
    """The settings of a command line of train_db.py."""
    return read_settings(
        TRAIN_DB, "test", DB_DEFAULTS, list(words), idle=DB_IDLE, rules=DB_RULES, absent=DB_ABSENT, choices=DB_CHOICES
    )


def fresh_accelerate() -> None:
    """Forget what accelerate keeps of the first run of a process, such as its precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class ModelRuns:
    """Runs of a second or two on pictures of 64 x 64, two at a time, six batches an epoch."""

    demo: DemoFolder
    root: Path

    def dataset(self, name: str = "tiny", more: str = "") -> Path:
        """A dataset file; `more` is about the subset."""
        path = self.root / f"{name}.toml"
        path.write_text(CONFIG.format(pictures=self.demo.pictures.as_posix(), more=more), encoding="utf-8")
        return path

    def settings(self, name: str, *words: str) -> Settings:
        """Those of run `name`, whose files lie in `root/name`; `words` win."""
        data = [] if "--dataset_config" in words or "--train_data_dir" in words else [str(self.dataset())]
        return db_settings(
            *("--pretrained_model_name_or_path", str(self.demo.checkpoint)),
            *("--tokenizer_cache_dir", str(self.demo.tokenizers), "--output_dir", str(self.root / name)),
            *("--output_name", "small", "--learning_rate", "1e-3", "--seed", "7", "--max_train_steps", "2"),
            *("--cache_latents", "--save_model_as", "safetensors", *words),
            *(["--dataset_config", *data] if data else []),
        )

    def train(self, name: str, *words: str) -> SmallModelTrainer:
        """A run that comes to its end; a mistake of the user's comes out as the exception that it is."""
        trainer = SmallModelTrainer(self.settings(name, *words))
        trainer.train()
        return trainer

    def weights(self, name: str, stem: str = "small") -> dict[str, Tensor]:
        """The file `stem` of run `name`."""
        return tensors(self.root / name / f"{stem}.safetensors")

    def state(self, name: str, stem: str = "small") -> str:
        """The state folder `stem` of run `name`."""
        return str(self.root / name / f"{stem}-state")
