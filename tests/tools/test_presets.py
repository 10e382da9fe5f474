from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import toml

from header_only import header, write_hollow_checkpoint
from library.files.weights import open_weights
from library.flags.declare import declared_flags
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK
from library.models.flux.flags import FLUX_IDLE, FLUX_TRAIN_NETWORK
from library.models.flux.rules import FLUX_RULES
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES, SDXL_TRAIN_NETWORK
from tests.clients.training_db import db_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SD15, SD15DB, SDXL, FLUX = (sorted(CONFIGS.glob(f"{name}_*.toml")) for name in ("sd15", "sd15db", "sdxl", "flux"))


def test_there_are_presets() -> None:
    assert [path.name for path in SD15] == ["sd15_12gb.toml", "sd15_8gb.toml"]
    assert {path.name for path in SD15DB} == {f"sd15db_{size}gb.toml" for size in (8, 12, 24)}
    assert {path.name for path in SDXL} == {f"sdxl_{size}gb.toml" for size in (8, 12, 24)}
    assert {path.name for path in FLUX} == {f"flux_{size}gb.toml" for size in (8, 12, 16, 24)}


def values_of(path: Path, folder: Path, flags: tuple[type, ...], files: list[str], **more: Any) -> dict[str, Any]:
    """The settings of a preset, which must be read without a word."""
    rest = [word for flag in files for word in (f"--{flag}", str(folder / "model.safetensors"))]
    (folder / "model.safetensors").touch()
    words = ["--config_file", str(path), "--output_dir", str(folder), "--train_data_dir", str(folder), *rest]
    settings = read_settings(flags, "test", argv=words, **more)
    assert settings.warnings == ()
    given = toml.loads(path.read_text(encoding="utf-8"))
    assert given.keys() <= declared_flags(flags).keys()
    values = settings.values()
    for key in ("network_dim", "learning_rate", "train_batch_size", "lr_warmup_steps"):
        assert values[key] == given[key]
    return values


@pytest.mark.parametrize("path", SD15, ids=lambda path: path.stem)
def test_a_preset_is_read_without_a_word(path: Path, tmp_path: Path) -> None:
    values = values_of(path, tmp_path, TRAIN_NETWORK, ["pretrained_model_name_or_path"])
    assert (values["resolution"], values["text_encoder_lr"]) == ((512, 512), (5e-5,))


@pytest.mark.parametrize("path", SDXL, ids=lambda path: path.stem)
def test_a_preset_for_sdxl_is_read_without_a_word(path: Path, tmp_path: Path) -> None:
    model = ["pretrained_model_name_or_path"]
    values = values_of(path, tmp_path, SDXL_TRAIN_NETWORK, model, idle=SDXL_IDLE, rules=SDXL_RULES)
    assert (values["resolution"], values["gradient_checkpointing"]) == ((1024, 1024), True)
    assert (
        values["network_train_unet_only"] == values["cache_text_encoder_outputs"] == (values["text_encoder_lr"] is None)
    )


@pytest.mark.parametrize("path", FLUX, ids=lambda path: path.stem)
def test_a_preset_for_flux_is_read_without_a_word(path: Path, tmp_path: Path) -> None:
    files = ["pretrained_model_name_or_path", "clip_l", "t5xxl", "ae"]
    values = values_of(path, tmp_path, FLUX_TRAIN_NETWORK, files, idle=FLUX_IDLE, rules=FLUX_RULES)
    assert (values["resolution"], values["fp8_scaled"], values["blocks_to_swap"]) == ((1024, 1024), True, 35)


@pytest.mark.parametrize("path", SD15DB, ids=lambda path: path.stem)
def test_a_preset_for_whole_models_is_read_without_a_word(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    rest = ["--pretrained_model_name_or_path", str(tmp_path / "model.safetensors"), "--train_data_dir", str(tmp_path)]
    settings = db_settings("--config_file", str(path), "--output_dir", str(tmp_path), *rest)
    assert settings.warnings == ()
    values = settings.values()
    for key, value in toml.loads(path.read_text(encoding="utf-8")).items():
        assert key == "resolution" or values[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("path", [*SD15, *SD15DB, *SDXL, *FLUX], ids=lambda path: path.stem)
def test_a_preset_says_what_a_dry_run_found_and_it_fits_with_room_to_spare(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (total,) = re.findall(r"^#  in all +([\d.]+) GB", text, re.MULTILINE)
    size = int(re.findall(r"_(\d+)gb", path.stem)[0])
    assert 0.4 * size < float(total) + 0.6 < 0.85 * size
    side = toml.loads(text)["resolution"].partition(",")[0]
    (batch,) = re.findall(rf"a step without content of (\d+) x {side}x{side}", text)
    assert int(batch) == toml.loads(text)["train_batch_size"]


def test_a_hollow_checkpoint_opens_as_the_published_one(tmp_path: Path) -> None:
    write_hollow_checkpoint(tmp_path / "model.safetensors", "sd15")
    with open_weights(tmp_path / "model.safetensors") as file:
        assert len(file.keys()) > 1000
        assert file.shape("model.diffusion_model.input_blocks.0.0.weight") == (320, 4, 3, 3)
    assert header("sd15", "float32")[1] > 1.9 * header("sd15", "float16")[1]
