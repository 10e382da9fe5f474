"""The tools that fill caches, on small FLUX.1 and Chroma models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_families import CACHE_LATENTS, CACHE_TEXT
from demo_flux_folder import FluxDemo
from library.flags.cache_tools import CacheTool
from library.flags.settings import Settings
from library.models.flux.architecture import Flux
from library.train.caches import fill_all_latents, fill_all_text, run_cache_tool

CPU = torch.device("cpu")


class Counted(Flux):
    """Remembers what was loaded."""

    loads: list[str] = []

    def load_vae(self, *args):
        self.loads.append("vae")
        return super().load_vae(*args)

    def load_text_encoders(self, *args):
        self.loads.append("text encoders")
        return super().load_text_encoders(*args)


def settings_for(tool: CacheTool, demo: FluxDemo, folder: Path, kind: str, *more: str) -> Settings:
    if not (folder / "1_things").exists():
        folder.mkdir(exist_ok=True)
        shutil.copytree(demo.pictures, folder / "1_things")
    flags = {
        "pretrained_model_name_or_path": demo.transformer(kind),
        "model_type": "chroma" if kind == "chroma" else "flux",
        "t5xxl": demo.t5xxl,
        "ae": demo.ae,
        "tokenizer_cache_dir": demo.tokenizers,
        "train_data_dir": folder,
        "caption_extension": ".txt",
        "resolution": 64,
        "t5xxl_max_token_length": 24,
    } | ({} if kind == "chroma" else {"clip_l": demo.clip_l})
    return tool.settings("test", ["--flux", *(f"--{name}={value}" for name, value in flags.items()), *more])


def test_latents_are_kept_with_their_size_in_the_name(small_flux: FluxDemo, tmp_path: Path) -> None:
    settings = settings_for(CACHE_LATENTS, small_flux, tmp_path, "dev", "--flip_aug")
    Counted.loads.clear()
    for _ in range(2):
        assert run_cache_tool(settings, Counted, fill_all_latents) == 0
    assert Counted.loads == ["vae"], "the second time every file is valid"
    files = sorted((tmp_path / "1_things").glob("*_flux.npz"))
    assert len(files) == len(list((tmp_path / "1_things").glob("*.png"))) > 2
    with np.load(files[0]) as arrays:
        names = {name for name in arrays.files if "fingerprint" not in name}
        assert names == {f"{name}_8x8" for name in ("latents", "latents_flipped", "original_size", "crop_ltrb")}
        assert arrays["latents_8x8"].shape == (16, 8, 8) and arrays["latents_8x8"].dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "more", "masked"),
    [("dev", (), False), ("dev", ("--apply_t5_attn_mask",), True), ("chroma", (), True)],
    ids=["dev", "dev masked", "chroma"],
)
def test_text_is_kept_as_recorded_and_as_a_step_would_encode_it(
    small_flux: FluxDemo, tmp_path: Path, kind: str, more: tuple[str, ...], masked: bool
) -> None:
    settings = settings_for(CACHE_TEXT, small_flux, tmp_path, kind, *more)
    Counted.loads.clear()
    for _ in range(2):
        assert run_cache_tool(settings, Counted, fill_all_text) == 0
    assert Counted.loads == ["text encoders"]
    file = sorted((tmp_path / "1_things").glob("*_flux_te.npz"))[-1]  # the first is that of the empty caption
    caption = file.with_name(file.name.replace("_flux_te.npz", ".txt")).read_text(encoding="utf-8").strip()
    arch = Flux(settings)
    live = arch.encode_text(arch.load_text_encoders(torch.float32, CPU), arch.tokenize([caption]))
    with np.load(file) as arrays:
        assert bool(arrays["apply_t5_attn_mask"]) == masked and arrays["apply_t5_attn_mask"].shape == ()
        rows = len(arrays["t5_out"])
        assert (rows < 24) == masked, "rows that nothing attends to are not kept"
        for name in arch.text.arrays:
            kept, whole = torch.from_numpy(arrays[name]), live[name][0]
            if name != "l_pooled":
                assert (whole[rows:] == 0).all() and len(kept) == rows
                whole = whole[:rows]
            torch.testing.assert_close(kept, whole, atol=1e-5, rtol=1e-4)
        assert arrays["t5_attn_mask"].dtype == np.int64 and arrays["txt_ids"].shape == (rows, 3)
        assert arrays["l_pooled"].shape == ((77, 1) if kind == "chroma" else live["l_pooled"].shape[1:])


def test_another_mask_and_another_length_make_text_anew(small_flux: FluxDemo, tmp_path: Path) -> None:
    Counted.loads.clear()
    for more in ((), ("--apply_t5_attn_mask",), ("--t5xxl_max_token_length=16",), ("--t5xxl_max_token_length=16",)):
        settings = settings_for(CACHE_TEXT, small_flux, tmp_path, "dev", *more)
        assert run_cache_tool(settings, Counted, fill_all_text) == 0
    assert Counted.loads == ["text encoders"] * 3
