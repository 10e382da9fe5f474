"""Caches that a tool fills are valid for the training, which then loads no encoder for them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from cache_families import CACHE_LATENTS, CACHE_TEXT
from demo_folder import DemoFolder
from library.data.config import read_dataset_config
from library.data.dataset import load_training_set
from library.data.items import BatchRequest
from library.files.formats import TextFormat
from library.flags.cache_tools import CacheTool
from library.flags.dataset import CaptionFlags, DatasetFlags
from library.flags.settings import Settings
from library.models.sd.architecture import StableDiffusion
from library.train.accelerator import make_accelerator
from library.train.caches import fill_all_latents, fill_all_text, run_cache_tool
from tests.clients.training import train


@pytest.fixture
def demo(small_sd: DemoFolder, tmp_path: Path) -> DemoFolder:
    """A copy of the small model's folder that may be written to."""
    return copied(small_sd, tmp_path / "demo")


def copied(small_sd: DemoFolder, root: Path) -> DemoFolder:
    shutil.copytree(small_sd.root, root)
    demo = DemoFolder(root)
    text = demo.dataset.read_text(encoding="utf-8")
    pictures = [folder.pictures.resolve().as_posix() for folder in (small_sd, demo)]
    demo.dataset.write_text(text.replace(*pictures), encoding="utf-8")
    return demo


class WithTextCache(StableDiffusion):
    """Stands in for a family that keeps encoded captions."""

    text = TextFormat("_te_outputs.npz", ("context",), {"max_token_length": 75})
    loads: ClassVar[list[str]] = []

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
        self.loads.append("text encoders")
        return super().load_text_encoders(dtype, device)

    def text_encoder_id(self) -> str:
        return "the small encoder"


def settings_for(tool: CacheTool, demo: DemoFolder, *words: str) -> Settings:
    return tool.settings(
        "test",
        [
            *("--pretrained_model_name_or_path", str(demo.checkpoint)),
            *("--tokenizer_cache_dir", str(demo.tokenizers)),
            *("--dataset_config", str(demo.dataset)),
            *words,
        ],
    )


def test_the_training_finds_every_cache_of_the_tool_and_never_loads_the_vae(
    demo: DemoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(CACHE_LATENTS, demo, "--vae_batch_size", "4")
    assert run_cache_tool(settings, StableDiffusion, fill_all_latents) == 0
    files = sorted(demo.pictures.rglob("*_sd.npz"))
    assert files
    before = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr(StableDiffusion, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
    train(demo, tmp_path / "out", "--cache_latents_to_disk")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_tool_and_the_training_make_the_same_files(demo: DemoFolder, small_sd: DemoFolder, tmp_path: Path) -> None:
    assert run_cache_tool(settings_for(CACHE_LATENTS, demo), StableDiffusion, fill_all_latents) == 0
    other = copied(small_sd, tmp_path / "other")
    train(other, tmp_path / "out", "--cache_latents_to_disk")
    files = sorted(demo.pictures.rglob("*_sd.npz"))
    for file in files:
        with np.load(file) as one, np.load(other.pictures / file.relative_to(demo.pictures)) as two:
            assert np.array_equal(one["latents"], two["latents"])
            assert str(one["fingerprint"]).split()[:2] == str(two["fingerprint"]).split()[:2]


def test_held_out_images_are_cached_too(demo: DemoFolder) -> None:
    text = demo.dataset.read_text(encoding="utf-8")
    demo.dataset.write_text(text.replace("batch_size = 2", "batch_size = 2\nvalidation_split = 0.25"), encoding="utf-8")
    assert run_cache_tool(settings_for(CACHE_LATENTS, demo), StableDiffusion, fill_all_latents) == 0
    assert len(list(demo.pictures.glob("*_sd.npz"))) == len(list(demo.pictures.glob("*.png"))) > 4


def test_sixteen_bits_are_written_when_asked_for(demo: DemoFolder) -> None:
    settings = settings_for(CACHE_LATENTS, demo, "--cache_dtype", "float16")
    assert run_cache_tool(settings, StableDiffusion, fill_all_latents) == 0
    with np.load(next(demo.pictures.rglob("*_sd.npz"))) as arrays:
        assert arrays["latents"].dtype == np.float16


def test_stable_diffusion_has_no_cache_of_text(demo: DemoFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert run_cache_tool(settings_for(CACHE_TEXT, demo), StableDiffusion, fill_all_text) == 1
    assert "sd models have no cache of text" in caplog.text
    assert not list(demo.pictures.rglob("*.npz"))


def test_encoded_captions_are_those_of_a_step_without_a_cache(demo: DemoFolder) -> None:
    settings = settings_for(CACHE_TEXT, demo, "--text_encoder_batch_size", "3", "--text_cache_variants", "2")
    WithTextCache.loads.clear()
    assert run_cache_tool(settings, WithTextCache, fill_all_text) == 0
    assert run_cache_tool(settings, WithTextCache, fill_all_text) == 0
    assert WithTextCache.loads == ["text encoders"]  # the second time nothing is missing
    arch = WithTextCache(settings)
    config = read_dataset_config(settings[DatasetFlags], settings[CaptionFlags], bucket_multiple=arch.bucket_multiple)
    data = load_training_set(config)
    fill_all_text(settings, arch, data, make_accelerator(settings))
    assert WithTextCache.loads == ["text encoders"] and all(dataset.text_cache for dataset in data.datasets)
    batch = data[BatchRequest(0, tuple(data.datasets[0].buckets[0].items[:2]), (1, 2), 1, 0, 1)]
    encoders = arch.load_text_encoders(torch.float32, torch.device("cpu"))
    expected = arch.encode_text(encoders, arch.tokenize(batch.captions))
    torch.testing.assert_close(batch.text["context"], expected["context"], atol=1e-5, rtol=1e-4)


def test_a_mistake_of_the_user_is_one_line(demo: DemoFolder, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(demo.pictures)
    assert run_cache_tool(settings_for(CACHE_LATENTS, demo), StableDiffusion, fill_all_latents) == 3
    assert "Traceback" not in caplog.text
    assert [record.levelno for record in caplog.records if record.levelno >= logging.ERROR] == [logging.ERROR]
