"""Runs sdxl_train_network.py in this process on the small SDXL model."""

from __future__ import annotations

from pathlib import Path

from demo_sdxl_folder import SdxlDemo
from library.flags.settings import Settings, read_settings
from library.models.sdxl.architecture import Sdxl
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES, SDXL_TRAIN_NETWORK
from library.train.network_trainer import NetworkTrainer


class SmallSdxlTrainer(NetworkTrainer):
    """As sdxl_train_network.py's."""

    architecture = Sdxl


def sdxl_words(demo: SdxlDemo, output: Path, *words: str) -> list[str]:
    """A short run; `words` come last and win."""
    return [
        *("--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)),
        *("--dataset_config", str(demo.dataset), "--output_dir", str(output), "--output_name", "small"),
        *("--network_module", "networks.lora", "--network_dim", "4", "--learning_rate", "1e-3"),
        *("--max_train_steps", "2", "--seed", "7", "--max_data_loader_n_workers", "0"),
        *words,
    ]


def sdxl_settings(words: list[str]) -> Settings:
    """The settings as sdxl_train_network.py reads them."""
    return read_settings(SDXL_TRAIN_NETWORK, "test", argv=words, idle=SDXL_IDLE, rules=SDXL_RULES)


def train_sdxl(demo: SdxlDemo, output: Path, *words: str) -> SmallSdxlTrainer:
    """Train to the end; a mistake of the user's comes out as the exception that it is."""
    trainer = SmallSdxlTrainer(sdxl_settings(sdxl_words(demo, output, *words)))
    trainer.train()
    return trainer
