"""`--text_encoder_lr1` and `--text_encoder_lr2` of SDXL say what two values of `--text_encoder_lr` say."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.flags.optimizer import OptimizerFlags
from library.flags.settings import Settings, read_settings
from library.models.sdxl.flags import SDXL_IDLE, SDXL_RULES, SDXL_TRAIN_NETWORK


def read(folder: Path, *words: str) -> Settings:
    (folder / "sdxl.safetensors").touch()
    (folder / "images").mkdir(exist_ok=True)
    base = [
        f"--pretrained_model_name_or_path={folder / 'sdxl.safetensors'}",
        f"--train_data_dir={folder / 'images'}",
        "--resolution=512",
        f"--output_dir={folder / 'out'}",
        "--network_module=networks.lora",
        "--learning_rate=3e-4",
    ]
    return read_settings(SDXL_TRAIN_NETWORK, "a test", argv=[*base, *words], idle=SDXL_IDLE, rules=SDXL_RULES)


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("--text_encoder_lr1=1e-5 --text_encoder_lr2=2e-5", (1e-5, 2e-5)),
        ("--text_encoder_lr1=1e-5", (1e-5, 3e-4)),
        ("--text_encoder_lr2=0", (3e-4, 0.0)),
        ("--text_encoder_lr 1e-5 2e-5", (1e-5, 2e-5)),
        ("--text_encoder_lr 1e-5", (1e-5,)),
        ("--seed=1", None),
    ],
)
def test_a_rate_that_is_not_given_is_the_learning_rate(
    tmp_path: Path, words: str, rates: tuple[float, ...] | None
) -> None:
    settings = read(tmp_path, *words.split())
    assert settings[OptimizerFlags].text_encoder_lr == rates
    said = [warning for warning in settings.warnings if "CLIP-L" in warning and "OpenCLIP bigG" in warning]
    assert len(said) == ("lr1" in words or "lr2" in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text_encoder_lr 1e-5 --text_encoder_lr1=1e-5", "--text_encoder_lr and --text_encoder_lr1, --text_encoder_"),
        ("--text_encoder_lr 1e-5 1e-5 --text_encoder_lr2=2e-5", "say the same thing differently"),
        ("--text_encoder_lr1=-1", "--text_encoder_lr1: must be at least 0, got -1.0"),
        ("--text_encoder_lr2=fast", "--text_encoder_lr2"),
    ],
)
def test_two_forms_at_once_and_bad_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        read(tmp_path, *words.split())
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert message in line
