"""A command line that is right, for tests that make one mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.flags.settings import Settings, read_settings
from library.flags.trainers import TRAIN_NETWORK

Read = Callable[..., Settings]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The shortest command line of train_network.py without a mistake."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "images").mkdir()
    return [
        f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}",
        f"--train_data_dir={tmp_path / 'images'}",
        "--resolution=512",
        f"--output_dir={tmp_path / 'out'}",
        "--network_module=networks.lora",
    ]


@pytest.fixture
def read(base: list[str]) -> Read:
    """Settings from `base` and some words more."""

    def read_with(*words: str) -> Settings:
        return read_settings(TRAIN_NETWORK, "a test", argv=[*base, *words])

    return read_with


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The mistakes, one a line, that end reading with exit code 2."""

    def mistakes(*words: str) -> list[str]:
        with pytest.raises(SystemExit) as end:
            read_settings(TRAIN_NETWORK, "a test", argv=words)
        assert end.value.code == 2
        first, *lines = capsys.readouterr().err.splitlines()
        assert first.endswith("in the settings:")
        return [line.strip() for line in lines]

    return mistakes
