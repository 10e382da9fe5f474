"""Uploads and downloads, over HTTP, to a stand-in for the hub."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from demo_folder import DemoFolder
from library.files.hub import HubPlace, Uploads, download_folder
from tests.clients.continuing import TinyRuns, equal
from tests.clients.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_files_and_folders_arrive_under_their_names(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    (tmp_path / "m-state").mkdir()
    (tmp_path / "m-state" / "train_state.json").write_bytes(b"{}")
    uploads = Uploads(HubPlace("me/lora", folder="runs/a/", token="secret"))
    uploads.send(tmp_path / "m.safetensors")
    uploads.send(tmp_path / "m-state")
    uploads.close()
    files = {"runs/a/m.safetensors": b"weights", "runs/a/m-state/train_state.json": b"{}"}
    assert hub.repositories == {"models/me/lora": files}
    assert hub.private == {"models/me/lora": True}
    assert hub.tokens == {"Bearer secret"}
    assert sum("/api/repos/create" in call for call in hub.calls) == 1


def test_a_repository_is_public_only_when_that_was_said(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(b"x")
    Uploads(HubPlace("me/data", kind="dataset", token="t", public=True)).send(tmp_path / "m.ckpt")
    assert hub.repositories == {"datasets/me/data": {"m.ckpt": b"x"}}
    assert hub.private == {"datasets/me/data": False}


def test_a_failed_upload_is_a_warning(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "m.ckpt").write_bytes(b"x")
    hub.fails = True
    with caplog.at_level(logging.WARNING):
        Uploads(HubPlace("me/lora", token="t")).send(tmp_path / "m.ckpt")
    assert "m.ckpt could not be uploaded to me/lora" in caplog.text and "training goes on" in caplog.text


def test_uploads_in_the_background_are_waited_for_at_the_end(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(b"x")
    hub.gate.clear()
    uploads = Uploads(HubPlace("me/lora", token="t"), in_background=True)
    uploads.send(tmp_path / "m.ckpt")
    assert hub.repositories.get("models/me/lora", {}) == {}
    threading.Timer(0.2, hub.gate.set).start()
    uploads.close()
    assert hub.repositories == {"models/me/lora": {"m.ckpt": b"x"}}


def test_a_folder_is_fetched_whole_and_nothing_else(hub: HubServer) -> None:
    hub.repositories["models/me/lora"] = {"runs/a-state/one": b"1", "runs/a-state/deep/two": b"2", "runs/b": b"3"}
    folder = download_folder("me/lora/runs/a-state:main", "t")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"one": b"1", "deep/two": b"2"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("me/lora", "expects owner/name/folder"),
        ("me/lora/nothing", "has no folder nothing"),
        ("me/missing/state", "could not be fetched from the hub"),
    ],
)
def test_what_cannot_be_fetched_is_named(hub: HubServer, place: str, message: str) -> None:
    hub.repositories["models/me/lora"] = {"a": b""}
    with pytest.raises(ValueError, match=f"--resume {place}.*{message}"):
        download_folder(place, "t")


@pytest.mark.parametrize("words", [(), ("--async_upload",)], ids=["at once", "in the background"])
def test_a_run_uploads_what_it_saves_and_another_continues_from_there(
    hub: HubServer, small_sd: DemoFolder, tmp_path: Path, words: tuple[str, ...]
) -> None:
    runs = TinyRuns(small_sd, tmp_path)
    common = ("--cache_latents", "--network_train_unet_only")
    place = ("--huggingface_repo_id", "me/lora", "--huggingface_path_in_repo", "a", "--huggingface_token", "t")
    saves = ("--save_every_n_steps", "1", "--save_state", "--save_state_to_huggingface")
    runs.train("first", *common, *place, *words, *saves, "--max_train_steps", "2")
    stored = hub.repositories["models/me/lora"]
    assert {name for name in stored if name.endswith(".safetensors") and "state" not in name} == {
        "a/small-step00000001.safetensors",
        "a/small-step00000002.safetensors",
        "a/small.safetensors",
    }
    assert stored["a/small.safetensors"] == (tmp_path / "first" / "small.safetensors").read_bytes()
    resume = ("--resume_from_huggingface", "--resume", "me/lora/a/small-step00000001-state", "--huggingface_token", "t")
    runs.train("second", *common, *resume, "--max_train_steps", "2")
    assert equal(runs.weights("first"), runs.weights("second"))


def test_a_run_whose_uploads_fail_comes_to_its_end(hub: HubServer, small_sd: DemoFolder, tmp_path: Path) -> None:
    hub.fails = True
    runs = TinyRuns(small_sd, tmp_path)
    runs.train("run", "--cache_latents", "--huggingface_repo_id", "me/lora", "--huggingface_token", "t")
    assert runs.names("run") == ["small.safetensors"]
