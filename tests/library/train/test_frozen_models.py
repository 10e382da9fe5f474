"""Text encoders whose answers are cached are gone before the denoiser is read, and nothing else changes."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from demo_folder import DemoFolder
from library.files.formats import TextFormat
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK, WITH_TEXT_CACHE
from library.models.sd.architecture import StableDiffusion
from library.train.network_trainer import NetworkTrainer
from tests.clients.continuing import tensors
from tests.clients.training import common_words

DATASET = """\
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{pictures}"
"""


class TextCachingModel(StableDiffusion):
    """Stands in for a family that caches its text; it remembers what was in memory when the U-Net was read."""

    text = TextFormat("_te_outputs.npz", ("context",))
    living: ClassVar[list[Any]] = []
    loads: ClassVar[list[str]] = []

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        self.loads.append("text encoders")
        encoders = super().load_text_encoders(dtype, device)
        self.living[:] = [weakref.ref(encoder) for encoder in encoders]
        return encoders

    def load_denoiser(self, *arguments: Any) -> nn.Module:
        alive = sum(encoder() is not None for encoder in self.living)
        self.loads.append(f"denoiser beside {alive}")
        return super().load_denoiser(*arguments)

    def text_encoder_id(self) -> str:
        return "the small encoder"


class TextCachingTrainer(NetworkTrainer):
    architecture = TextCachingModel


def trained(demo: DemoFolder, output: Path, *words: str, dry: bool = False) -> TextCachingTrainer:
    output.mkdir(parents=True, exist_ok=True)
    dataset = output / "dataset.toml"
    dataset.write_text(DATASET.format(pictures=demo.pictures.as_posix()), encoding="utf-8")
    common = [*common_words(demo, output), "--dataset_config", str(dataset)]
    groups = (*TRAIN_NETWORK, *WITH_TEXT_CACHE)
    TextCachingModel.loads.clear()
    trainer = TextCachingTrainer(read_settings(groups, "test", argv=[*common, *words]))
    if dry:
        trainer.dry_run()
    else:
        trainer.train()
    gc.collect()
    return trainer


@pytest.fixture(scope="module")
def words(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What the runs that are compared say: they make pictures, and start from the same weights."""
    start = tmp_path_factory.mktemp("start")
    prompts = start / "prompts.txt"
    prompts.write_text("an orange circle --w 64 --h 64 --s 2 --d 3 --n star\n", encoding="utf-8")
    trained(small_sd, start, "--network_train_unet_only")
    return (
        *("--network_train_unet_only", "--max_train_steps", "4", "--network_weights", str(start / "small.safetensors")),
        # A caption's encoding differs in its last bits with the batch it is in, and Adam would make steps of that.
        *("--optimizer_type", "SGD", "--learning_rate", "1"),
        *("--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "2"),
    )


@pytest.fixture(scope="module")
def uncached(small_sd: DemoFolder, tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Path:
    output = tmp_path_factory.mktemp("uncached")
    trained(small_sd, output, *words)
    return output


@pytest.fixture
def own_pictures(small_sd: DemoFolder) -> Iterator[DemoFolder]:
    """The small model's folder, without the caches that a test leaves."""
    yield small_sd
    for file in small_sd.pictures.glob("*_te_outputs.npz"):
        file.unlink()


def pictures(output: Path) -> list[np.ndarray]:
    files = sorted((output / "sample").iterdir())
    return [np.asarray(Image.open(file)).astype(int) for file in files]


@pytest.mark.parametrize("where", ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"])
def test_a_run_with_cached_text_learns_what_one_without_learns(
    own_pictures: DemoFolder, tmp_path: Path, words: tuple[str, ...], uncached: Path, where: str
) -> None:
    trained(own_pictures, tmp_path / "cached", *words, where)
    assert TextCachingModel.loads == ["text encoders", "denoiser beside 0"]
    ours, theirs = (tensors(folder / "small.safetensors") for folder in (tmp_path / "cached", uncached))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=2e-5, rtol=1e-4)
    with_cache, without = pictures(tmp_path / "cached"), pictures(uncached)
    assert len(with_cache) == len(without) == 3
    assert max(np.abs(one - other).max() for one, other in zip(with_cache, without, strict=True)) <= 1


def test_a_run_that_trains_a_text_encoder_whose_answers_are_cached_is_refused(
    small_sd: DemoFolder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="leaves no text encoder to be trained: add --network_train_unet_only"):
        trained(small_sd, tmp_path, "--cache_text_encoder_outputs")


def test_captions_that_change_are_refused_before_anything_is_encoded(small_sd: DemoFolder, tmp_path: Path) -> None:
    words = ("--cache_text_encoder_outputs", "--network_train_unet_only", "--shuffle_caption")
    with pytest.raises(ValueError, match="text_cache_variants"):
        trained(small_sd, tmp_path, *words)
    assert TextCachingModel.loads == []


def test_prompts_keep_their_words_once_the_text_encoders_are_gone(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--cache_text_encoder_outputs", "--network_train_unet_only", "--sample_at_first")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star --w 64 --h 64 --s 1 --d 3\n", encoding="utf-8")
    trainer = trained(small_sd, tmp_path / "run", *words, "--sample_prompts", str(prompts))
    before = trainer.previews.requests
    prompts.write_text("a circle --w 64 --h 64 --s 1 --d 3\n", encoding="utf-8")
    trainer.previews._read_again()
    assert trainer.previews.requests == before and "the words of prompts cannot change" in caplog.text
    prompts.write_text("a star --w 128 --h 64 --s 1 --d 4\n", encoding="utf-8")
    trainer.previews._read_again()
    assert [request.width for request in trainer.previews.requests] == [128]


def test_a_dry_run_estimates_a_step_with_cached_text_and_no_text_encoder(
    small_sd: DemoFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ("--cache_text_encoder_outputs", "--network_train_unet_only")
    trained(small_sd, tmp_path, *words, dry=True)
    text = caplog.text
    assert re.search(r"denoiser +[1-9]", text) and not re.search(r"text encoders +[0-9.]+ [MG]B", text)
    assert re.search(r"one step +[1-9].* a step without content", text)
