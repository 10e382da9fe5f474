"""The flags of train_db.py are the recorded ones; what it does not take, or what contradicts itself, is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.flags.declare import script_flags
from library.flags.dreambooth import DB_ABSENT, DB_CHOICES, DB_DEFAULTS, DB_IDLE, DB_RULES, TRAIN_DB, DreamBoothFlags
from library.flags.output import OutputFlags
from library.flags.settings import Settings, read_settings
from tests.library.flags.recorded import recorded_flags, signature


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "folder").mkdir()
    file = tmp_path / "model.safetensors"
    return [f"--pretrained_model_name_or_path={file}", f"--output_dir={tmp_path}", "--dataset_class=a.B"]


def read(*words: str) -> Settings:
    return read_settings(
        TRAIN_DB, "test", DB_DEFAULTS, list(words), idle=DB_IDLE, rules=DB_RULES, absent=DB_ABSENT, choices=DB_CHOICES
    )


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    with pytest.raises(SystemExit):
        read(*words)
    return [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]


def test_every_recorded_flag_is_declared_with_the_same_signature(facts: Path) -> None:
    flags = script_flags(TRAIN_DB, {}, DB_ABSENT, DB_CHOICES)
    rows = recorded_flags(facts, "train_db")
    assert len(rows) == 169
    for name, row in rows.items():
        ours = signature(flags[name], DB_DEFAULTS.get(name, flags[name].default))
        assert ours == {key: row.get(key) for key in ours}


def test_no_recorded_flag_is_unavailable_and_none_of_the_script_s_own_is_idle(facts: Path) -> None:
    flags = script_flags(TRAIN_DB, DB_IDLE, DB_ABSENT, DB_CHOICES)
    assert not any(flags[name].metadata["unavailable"] for name in recorded_flags(facts, "train_db"))
    assert not any(flags[name].metadata["no_effect"] for name in DreamBoothFlags.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "place", "kind"),
    [
        ("", "model.safetensors", "ckpt"),
        ("--use_safetensors", "model.safetensors", "safetensors"),
        ("--save_model_as=ckpt --use_safetensors", "model.safetensors", "safetensors"),
        ("--save_model_as=diffusers", "model.safetensors", "diffusers"),
        ("--save_model_as=safetensors", "folder", "safetensors"),
        ("", "folder", "diffusers"),
        ("--use_safetensors", "folder", "diffusers_safetensors"),
        ("--save_model_as=diffusers --use_safetensors", "folder", "diffusers_safetensors"),
        ("", "owner/name", "diffusers"),
        ("--save_model_as=diffusers_safetensors", "owner/name", "diffusers_safetensors"),
    ],
)
def test_the_kind_of_file_follows_from_flags_and_base(
    base: list[str], tmp_path: Path, words: str, place: str, kind: str
) -> None:
    path = place if "/" in place else tmp_path / place
    settings = read(*base, f"--pretrained_model_name_or_path={path}", *words.split())
    assert settings[OutputFlags].save_model_as == kind
    said = [line for line in settings.warnings if "will be" in line]
    asked = words.startswith("--save_model_as") and "use_safetensors" not in words
    assert len(said) == (0 if asked else 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unet_lr=1", "--unet_lr is not a flag of this script: the U-Net is trained with --learning_rate"),
        (
            "--text_encoder_lr 1 2",
            "--text_encoder_lr is not a flag of this script: the text encoder's rate is --learning_rate_te",
        ),
        ("--training_comment=a", "--training_comment is not a flag of this script: a checkpoint holds no"),
        ("--no_metadata", "--no_metadata is not a flag of this script: a checkpoint holds no"),
        ("--network_dim=4", "--network_dim"),
        ("--save_model_as=pt", "--save_model_as: invalid choice: 'pt'"),
        ("--no_token_padding --max_token_length=150", "--no_token_padding reads one row"),
        ("--learning_rate_te=1e-6 --stop_text_encoder_training=-1", "--learning_rate_te=1e-06 is for the text encoder"),
        ("--stop_text_encoder_training=-2", "--stop_text_encoder_training"),
        ("--full_bf16", "--full_bf16 needs --mixed_precision=bf16"),
        ("--fused_backward_pass --optimizer_type=AdamW", "--fused_backward_pass"),
    ],
)
def test_what_cannot_be_is_named(base: list[str], capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    (line,) = refused(capsys, *base, *words.split())
    assert line.startswith(message), line


def test_a_config_file_may_not_hold_them_either(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text("unet_lr = 1e-4\nsave_model_as = 'diffusers'\n", encoding="utf-8")
    (line,) = refused(capsys, *base, f"--config_file={tmp_path / 'run'}")
    assert line.endswith("unet_lr is not a flag of this script: the U-Net is trained with --learning_rate")


def test_what_has_no_effect_is_said(base: list[str]) -> None:
    words = ("--fp8_base", "--fp8_base_unet", "--mixed_precision=bf16", "--stop_text_encoder_training=1600")
    settings = read(*base, "--save_model_as=ckpt", *words)
    effect, stop = settings.warnings
    assert effect.startswith("--fp8_base, --fp8_base_unet have no effect: every weight of the model is trained")
    assert stop.startswith("--stop_text_encoder_training=1600 has no effect: the run ends after")
