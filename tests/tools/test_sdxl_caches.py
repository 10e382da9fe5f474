"""The tools that fill caches, on a small SDXL model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_families import CACHE_LATENTS, CACHE_TEXT
from demo_sdxl_folder import SdxlDemo
from library.flags.cache_tools import CacheTool
from library.flags.settings import Settings
from library.models.sdxl.architecture import Sdxl
from library.train.caches import fill_all_latents, fill_all_text, run_cache_tool
from tests.clients.sdxl_training import SmallSdxlTrainer, sdxl_settings, sdxl_words

CPU = torch.device("cpu")


class Counted(Sdxl):
    """Remembers what was loaded."""

    loads: list[str] = []

    def load_vae(self, *args):
        self.loads.append("vae")
        return super().load_vae(*args)

    def load_text_encoders(self, *args):
        self.loads.append("text encoders")
        return super().load_text_encoders(*args)


class CountedTrainer(SmallSdxlTrainer):
    """A training that remembers what was loaded."""

    architecture = Counted


@pytest.fixture
def images(small_sdxl: SdxlDemo, tmp_path: Path) -> Path:
    """Four pictures with captions, in a folder of folders."""
    folder = tmp_path / "images" / "1_things"
    folder.mkdir(parents=True)
    for picture in sorted(small_sdxl.pictures.glob("*.png"))[:4]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    return folder


def data_words(images: Path) -> list[str]:
    return ["--train_data_dir", str(images.parent), "--caption_extension=.txt", "--resolution=64"]


def settings_for(tool: CacheTool, demo: SdxlDemo, images: Path, *more: str) -> Settings:
    model = ["--pretrained_model_name_or_path", str(demo.checkpoint), "--tokenizer_cache_dir", str(demo.tokenizers)]
    return tool.settings("test", ["--sdxl", *model, *data_words(images), *more])


def test_latents_have_the_published_name_and_arrays(small_sdxl: SdxlDemo, images: Path) -> None:
    Counted.loads.clear()
    for _ in range(2):
        settings = settings_for(CACHE_LATENTS, small_sdxl, images, "--flip_aug")
        assert run_cache_tool(settings, Counted, fill_all_latents) == 0
    assert Counted.loads == ["vae"], "the second time every file is valid"
    assert len(list(images.glob("*_sdxl.npz"))) == 4
    with np.load(images / "01_orange_circle_0192x0192_sdxl.npz") as arrays:
        assert set(arrays.files) == {*("latents", "original_size", "crop_ltrb", "latents_flipped", "fingerprint")}
        assert arrays["latents"].shape == (4, 8, 8) and arrays["original_size"].tolist() == [192, 192]


def test_text_is_kept_as_a_step_would_encode_it(small_sdxl: SdxlDemo, images: Path) -> None:
    Counted.loads.clear()
    settings = settings_for(CACHE_TEXT, small_sdxl, images, "--max_token_length=225")
    for _ in range(2):
        assert run_cache_tool(settings, Counted, fill_all_text) == 0
    assert Counted.loads == ["text encoders"]
    caption = (images / "01_orange_circle.txt").read_text(encoding="utf-8").strip()
    arch = Sdxl(settings)
    live = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), arch.tokenize([caption]))
    with np.load(images / "01_orange_circle_te_outputs.npz") as arrays:
        assert {name: arrays[name].shape for name in arch.text.arrays} == {
            "hidden_state1": (227, 64),
            "hidden_state2": (227, 128),
            "pool2": (128,),
        }
        for name in arch.text.arrays:
            torch.testing.assert_close(torch.from_numpy(arrays[name]), live[name][0], atol=1e-5, rtol=1e-4)


def test_another_length_or_brackets_as_weights_make_text_anew(small_sdxl: SdxlDemo, images: Path) -> None:
    Counted.loads.clear()
    for more in ((), ("--max_token_length=150",), ("--weighted_captions",), ("--weighted_captions",)):
        assert run_cache_tool(settings_for(CACHE_TEXT, small_sdxl, images, *more), Counted, fill_all_text) == 0
    assert Counted.loads == ["text encoders"] * 3


def test_a_training_finds_what_the_tools_made_and_loads_neither_vae_nor_encoders(
    small_sdxl: SdxlDemo, images: Path, tmp_path: Path
) -> None:
    for tool, fill in ((CACHE_LATENTS, fill_all_latents), (CACHE_TEXT, fill_all_text)):
        assert run_cache_tool(settings_for(tool, small_sdxl, images), Counted, fill) == 0
    Counted.loads.clear()
    words = [*data_words(images), "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    common = sdxl_words(small_sdxl, tmp_path / "out", "--network_train_unet_only", *words)
    place = common.index("--dataset_config")
    CountedTrainer(sdxl_settings(common[:place] + common[place + 2 :])).train()
    assert Counted.loads == []
    assert (tmp_path / "out" / "small.safetensors").exists()
