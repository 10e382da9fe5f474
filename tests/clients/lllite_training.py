"""Runs sdxl_train_control_net_lllite.py in this process on the small SDXL model and pairs of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch import Tensor, nn

from demo_sdxl_folder import SdxlDemo
from library.flags.lllite import LLLITE_ABSENT, LLLITE_IDLE, LLLITE_RULES, TRAIN_LLLITE, LlliteFlags
from library.flags.settings import Settings, read_settings
from library.models.sdxl.architecture import Sdxl
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES
from library.train.control_trainer import ControlTrainer
from networks.control_net_lllite import ControlNetLLLite, create_network
from tests.clients.continuing import tensors

CONFIG = """\
[general]
caption_extension = ".txt"
{general}

[[datasets]]
resolution = 64
batch_size = 2
{dataset}

  [[datasets.subsets]]
  image_dir = "{pictures}"
  conditioning_data_dir = "{edges}"
"""


class SmallControlTrainer(ControlTrainer):
    """As sdxl_train_control_net_lllite.py's."""

    architecture = Sdxl
    kind = "control-net-lllite"

    def make_network(self, denoiser: nn.Module, flags: LlliteFlags) -> ControlNetLLLite:
        """As the script does."""
        return create_network(
            denoiser, flags.network_weights, flags.cond_emb_dim, flags.network_dim, flags.network_dropout
        )


def lllite_settings(*words: str) -> Settings:
    """The settings of a command line, as the script reads them."""
    idle = {**SDXL_IDLE, **LLLITE_IDLE}
    rules = SDXL_RULES + LLLITE_RULES
    return read_settings(TRAIN_LLLITE, "test", argv=list(words), idle=idle, rules=rules, absent=LLLITE_ABSENT)


def write_edges(pictures: Path, edges: Path) -> None:
    """White edges on black, for each picture under its own name."""
    edges.mkdir(parents=True, exist_ok=True)
    for path in sorted(pictures.glob("*.png")):
        with Image.open(path) as image:
            drawn = cv2.Canny(np.asarray(image.convert("RGB")), 100, 200)
        Image.fromarray(drawn).save(edges / path.name)


@dataclass(frozen=True)
class LlliteRuns:
    """Runs of a second or two on pairs of pictures of 64 x 64, six batches an epoch."""

    demo: SdxlDemo
    root: Path

    def dataset(self, name: str = "pairs", general: str = "", dataset: str = "") -> Path:
        """A dataset file; `general` and `dataset` are lines of these tables."""
        edges = self.root / "edges"
        if not edges.exists():
            write_edges(self.demo.pictures, edges)
        path = self.root / f"{name}.toml"
        folders = {"pictures": self.demo.pictures.as_posix(), "edges": edges.as_posix()}
        path.write_text(CONFIG.format(general=general, dataset=dataset, **folders), encoding="utf-8")
        return path

    def words(self, name: str, *words: str) -> list[str]:
        """The command line of run `name`, whose files lie in `root/name`; `words` win."""
        given = any(word.startswith(("--dataset_config", "--train_data_dir", "--dataset_class")) for word in words)
        return [
            *("--pretrained_model_name_or_path", str(self.demo.checkpoint)),
            *("--tokenizer_cache_dir", str(self.demo.tokenizers), "--output_dir", str(self.root / name)),
            *("--output_name", "small", "--learning_rate", "1e-3", "--seed", "7", "--max_train_steps", "2"),
            *("--cond_emb_dim", "8", "--network_dim", "8", "--max_data_loader_n_workers", "0"),
            *([] if given else ["--dataset_config", str(self.dataset())]),
            *words,
        ]

    def train(self, name: str, *words: str) -> SmallControlTrainer:
        """A run that comes to its end; a mistake of the user's comes out as the exception that it is."""
        trainer = SmallControlTrainer(lllite_settings(*self.words(name, *words)))
        trainer.train()
        return trainer

    def weights(self, name: str, stem: str = "small") -> dict[str, Tensor]:
        """The file `stem` of run `name`."""
        return tensors(self.root / name / f"{stem}.safetensors")

    def state(self, name: str, stem: str = "small") -> str:
        """The state folder `stem` of run `name`."""
        return str(self.root / name / f"{stem}-state")
