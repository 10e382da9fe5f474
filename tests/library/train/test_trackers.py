"""Where a run logs to besides its own file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from library.flags.output import LoggingFlags, OutputFlags
from library.flags.settings import Settings
from library.train.accelerator import make_accelerator
from library.train.trackers import read_tracker_config, run_directory, shown_settings, start_trackers, wanted_trackers

pytestmark = pytest.mark.usefixtures("fresh_processes")


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        (LoggingFlags(), ()),
        (LoggingFlags(logging_dir="logs"), ("tensorboard",)),
        (LoggingFlags(logging_dir="logs", log_with="tensorboard"), ("tensorboard",)),
    ],
)
def test_a_folder_alone_means_tensorboard(flags: LoggingFlags, trackers: tuple[str, ...]) -> None:
    assert wanted_trackers(flags) == trackers


@pytest.mark.parametrize("name", ["tensorboard", "all"])
def test_tensorboard_without_a_folder_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"--log_with={name} needs --logging_dir"):
        wanted_trackers(LoggingFlags(log_with=name))


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        wanted_trackers(LoggingFlags(log_with="wandb"))


def test_each_run_logs_to_a_folder_of_its_own_time(tmp_path: Path) -> None:
    directory = run_directory(LoggingFlags(logging_dir=str(tmp_path), log_prefix="try_"))
    assert directory.parent == tmp_path
    assert directory.name.startswith("try_20") and len(directory.name) == len("try_") + 14


def test_tensorboard_starts_under_the_trackers_name_with_the_settings(tmp_path: Path) -> None:
    logs = LoggingFlags(logging_dir=str(tmp_path), log_tracker_name="cats", log_config=True)
    settings = Settings.of(logs, OutputFlags(output_name="m"))
    accelerator = make_accelerator(settings)
    start_trackers(accelerator, settings)
    accelerator.log({"loss/current": 1.0}, step=1)
    accelerator.end_training()
    (run,) = tmp_path.iterdir()
    assert (run / "cats").is_dir()
    assert list(run.rglob("events.out.tfevents.*"))
    (told,) = run.rglob("hparams.yml")
    assert "output_name: m" in told.read_text(encoding="utf-8")


def test_the_default_name_of_the_tracker_is_that_of_the_script(tmp_path: Path) -> None:
    settings = Settings.of(LoggingFlags(logging_dir=str(tmp_path)))
    accelerator = make_accelerator(settings)
    start_trackers(accelerator, settings)
    accelerator.end_training()
    (run,) = tmp_path.iterdir()
    assert (run / "network_train").is_dir()


def test_wandb_is_logged_in_to_and_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    class Wandb:
        @staticmethod
        def login(key: str) -> None:
            keys.append(key)

    class Processes:
        is_main_process = True
        logging_dir = None
        started: tuple[Any, ...] = ()

        def init_trackers(self, name: str, config: Any, init_kwargs: Any) -> None:
            self.started = (name, config, init_kwargs)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    flags = LoggingFlags(log_with="wandb", wandb_run_name="try 3", wandb_api_key="secret")
    processes = Processes()
    start_trackers(processes, Settings.of(flags))  # type: ignore[arg-type]
    assert keys == ["secret"]
    assert processes.started == ("network_train", None, {"wandb": {"name": "try 3"}})
    config = tmp_path / "tracker.toml"
    config.write_text("[wandb]\nname = 'other'\n", encoding="utf-8")
    flags = LoggingFlags(log_with="wandb", wandb_run_name="try 3", log_tracker_config=str(config))
    start_trackers(processes, Settings.of(flags))  # type: ignore[arg-type]
    assert processes.started[2] == {"wandb": {"name": "other"}}


def test_a_tracker_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--log_tracker_config .*none.toml cannot be read"):
        read_tracker_config(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[wandb\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.toml is not valid TOML"):
        read_tracker_config(str(broken))


def test_settings_are_shown_without_keys_and_without_absolute_paths() -> None:
    values = {
        "wandb_api_key": "secret",
        "huggingface_token": "secret",
        "train_data_dir": "/home/me/pictures",
        "vae": "C:\\models\\vae.safetensors",
        "base_weights": ("a.safetensors", "/home/me/b.safetensors"),
        "output_dir": "output",
        "keep_tokens": 1,
        "seed": None,
        "optimizer_args": ("weight_decay=0.1",),
    }
    assert shown_settings(values) == {
        "output_dir": "output",
        "keep_tokens": 1,
        "seed": "None",
        "optimizer_args": "('weight_decay=0.1',)",
    }
