"""Runs flux_train_network.py in this process on the small FLUX models."""

from __future__ import annotations

from pathlib import Path

from demo_flux_folder import FluxDemo
from library.flags.settings import Settings, read_settings
from library.models.flux.architecture import Flux
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK
from library.models.flux.rules import FLUX_RULES
from library.train.network_trainer import NetworkTrainer


class SmallFluxTrainer(NetworkTrainer):
    """As flux_train_network.py's."""

    architecture = Flux


def model_words(demo: FluxDemo, kind: str = "dev") -> list[str]:
    """The flags that name the model's files."""
    words = ["--pretrained_model_name_or_path", str(demo.transformer(kind)), "--t5xxl", str(demo.t5xxl)]
    words += ["--ae", str(demo.ae), "--tokenizer_cache_dir", str(demo.tokenizers)]
    if kind == "chroma":
        return [*words, "--model_type", "chroma", "--guidance_scale", "0", "--apply_t5_attn_mask"]
    return [*words, "--clip_l", str(demo.clip_l), "--guidance_scale", "1"]


def flux_words(demo: FluxDemo, output: Path, *words: str, kind: str = "dev") -> list[str]:
    """A short run; `words` come last and win."""
    return [
        *model_words(demo, kind),
        *("--dataset_config", str(demo.dataset), "--output_dir", str(output), "--output_name", "small"),
        *("--network_module", "networks.lora_flux", "--network_dim", "4", "--learning_rate", "1e-3"),
        *("--model_prediction_type", "raw", "--timestep_sampling", "flux_shift", "--t5xxl_max_token_length", "32"),
        *("--max_train_steps", "2", "--seed", "7", "--max_data_loader_n_workers", "0"),
        *words,
    ]


def flux_settings(words: list[str]) -> Settings:
    """The settings as flux_train_network.py reads them."""
    return read_settings(FLUX_TRAIN_NETWORK, "test", argv=words, idle=FLUX_IDLE, rules=FLUX_RULES)


def train_flux(demo: FluxDemo, output: Path, *words: str, kind: str = "dev") -> SmallFluxTrainer:
    """Train to the end; a mistake of the user's comes out as the exception that it is."""
    trainer = SmallFluxTrainer(flux_settings(flux_words(demo, output, *words, kind=kind)))
    trainer.train()
    return trainer
