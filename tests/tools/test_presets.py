from __future__ import annotations

import re
from pathlib import Path

import pytest
import toml

from header_only import header, write_hollow_checkpoint
from library.files.weights import open_weights
from library.flags.declare import declared_flags
from library.flags.settings import read_settings
from library.flags.trainers import TRAIN_NETWORK

PRESETS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


def test_there_are_presets() -> None:
    assert [path.name for path in PRESETS] == ["sd15_12gb.toml", "sd15_8gb.toml"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_read_without_a_word(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    rest = ["--pretrained_model_name_or_path", str(tmp_path / "model.safetensors"), "--train_data_dir", str(tmp_path)]
    settings = read_settings(
        TRAIN_NETWORK, "test", argv=["--config_file", str(path), "--output_dir", str(tmp_path), *rest]
    )
    assert settings.warnings == ()
    given = toml.loads(path.read_text(encoding="utf-8"))
    assert given.keys() <= declared_flags(TRAIN_NETWORK).keys()
    values = settings.values()
    assert (values["resolution"], values["text_encoder_lr"]) == ((512, 512), (5e-5,))
    for key in ("network_dim", "learning_rate", "min_snr_gamma", "train_batch_size", "lr_warmup_steps"):
        assert values[key] == given[key]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_a_dry_run_found_and_it_fits_with_room_to_spare(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (total,) = re.findall(r"^#  in all +([\d.]+) GB", text, re.MULTILINE)
    size = int(re.findall(r"_(\d+)gb", path.stem)[0])
    assert 0.4 * size < float(total) + 0.6 < 0.85 * size
    (batch,) = re.findall(r"a step without content of (\d+) x 512x512", text)
    assert int(batch) == toml.loads(text)["train_batch_size"]


def test_a_hollow_checkpoint_opens_as_the_published_one(tmp_path: Path) -> None:
    write_hollow_checkpoint(tmp_path / "model.safetensors", "sd15")
    with open_weights(tmp_path / "model.safetensors") as file:
        assert len(file.keys()) > 1000
        assert file.shape("model.diffusion_model.input_blocks.0.0.weight") == (320, 4, 3, 3)
    assert header("sd15", "float32")[1] > 1.9 * header("sd15", "float16")[1]
