"""Runs train_network.py in this process on the small model, and says where its file lies."""

from __future__ import annotations

from pathlib import Path

from demo_folder import DemoFolder
from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK
from library.models.sd.architecture import StableDiffusion
from library.train.network_trainer import NetworkTrainer


class SmallTrainer(NetworkTrainer):
    """As train_network.py's."""

    architecture = StableDiffusion


def common_words(demo: DemoFolder, output: Path) -> list[str]:
    """What every command line says."""
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint)),
        *("--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--output_dir", str(output)),
        *("--output_name", "small"),
        *("--network_module", "networks.lora"),
        *("--network_dim", "4"),
        *("--learning_rate", "1e-3"),
        *("--max_train_steps", "2"),
        *("--seed", "7"),
    ]


def small_settings(demo: DemoFolder, output: Path, *words: str) -> Settings:
    """The settings of a command line; `words` come last and win."""
    common = common_words(demo, output)
    data = [] if "--dataset_config" in words or "--train_data_dir" in words else [str(demo.dataset)]
    return read_settings(TRAIN_NETWORK, "test", argv=[*common, *(["--dataset_config", *data] if data else []), *words])


def train(demo: DemoFolder, output: Path, *words: str) -> SmallTrainer:
    """Train to the end; a mistake of the user's comes out as the exception that it is."""
    trainer = SmallTrainer(small_settings(demo, output, *words))
    trainer.train()
    return trainer


def run(*words: str) -> int:
    """The exit code of a run with this command line."""
    return SmallTrainer(read_settings(TRAIN_NETWORK, "test", argv=list(words))).run()
