from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from demo_folder import DemoFolder
from library.train.interruption import Request, Requests
from library.train.log_file import read_log
from tests.clients.continuing import TinyRuns, equal
from tests.clients.training import SmallTrainer, small_settings

CPU = torch.device("cpu")


def test_a_signal_is_a_request_to_end_and_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    requests = Requests(tmp_path, True, CPU)
    before = signal.getsignal(signal.SIGINT)
    with requests.listening():
        assert requests.next() is Request.NOTHING
        signal.raise_signal(signal.SIGINT)
        assert requests.next() is Request.INTERRUPT and requests.last.ends_run
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_files_are_heard_once_and_by_the_main_process_alone(tmp_path: Path) -> None:
    (tmp_path / "save").touch()
    assert Requests(tmp_path, False, CPU).next() is Request.NOTHING
    requests = Requests(tmp_path, True, CPU)
    assert requests.next() is Request.SAVE and not requests.last.ends_run
    assert requests.next() is Request.NOTHING
    (tmp_path / "save").touch()
    (tmp_path / "stop").touch()
    assert requests.next() is Request.STOP and requests.last.ends_run
    assert list(tmp_path.iterdir()) == [tmp_path / "save"]


def test_a_folder_called_save_is_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    assert Requests(tmp_path, True, CPU).next() is Request.NOTHING


def ending(folder: Path) -> str:
    """What log and page say about the end of a run; both say the same."""
    (row,) = [row for row in read_log(folder / "small.log.jsonl", before=10**9) if row.get("event") == "end"]
    assert f'<p class="ending">{row["text"]}</p>' in (folder / "small.report.html").read_text(encoding="utf-8")
    return row["text"]


def asking(runs: TinyRuns, name: str, files: dict[int, str], *words: str) -> SmallTrainer:
    """A trainer in whose output folder files appear in the middle of the step after each of the given numbers."""

    class Asked(SmallTrainer):
        def update(self) -> None:
            if self.state.step in files:
                (runs.root / name / files[self.state.step]).touch()
            super().update()

    return Asked(small_settings(runs.demo, runs.root / name, *runs.words("--cache_latents", *words)))


def test_the_files_save_and_stop_do_what_they_are_called(small_sd: DemoFolder, tmp_path: Path) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    (tmp_path / "run").mkdir()
    words = ("--network_train_unet_only", "--max_train_steps", "6")
    assert asking(runs, "run", {1: "save", 3: "stop"}, *words).run() == 0
    assert runs.names("run") == [
        "small-step00000002.safetensors",
        "small-step00000004-state",
        "small-step00000004.safetensors",
    ]
    assert not (tmp_path / "run" / "save").exists() and not (tmp_path / "run" / "stop").exists()
    assert ending(tmp_path / "run") == "stopped after step 4; everything was saved, and --resume goes on from there"
    runs.train("whole", "--cache_latents", *words)
    runs.train("resumed", "--cache_latents", *words, "--resume", runs.state("run", "small-step00000004"))
    assert equal(runs.weights("whole"), runs.weights("resumed"))


def test_ctrl_c_twice_ends_with_the_same_code_and_saves_nothing(small_sd: DemoFolder, tmp_path: Path) -> None:
    runs = TinyRuns(small_sd, tmp_path)

    class Impatient(SmallTrainer):
        def update(self) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    words = runs.words("--cache_latents", "--network_train_unet_only")
    assert Impatient(small_settings(small_sd, tmp_path / "run", *words)).run() == 130
    assert runs.names("run") == []
    assert ending(tmp_path / "run") == "interrupted at once; what was learnt since the last saved file is lost"
