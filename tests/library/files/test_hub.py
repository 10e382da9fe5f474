"""Hub ids are told from paths, and an unreachable hub is an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from library.files import hub
from library.files.hub import download, is_hub_id


class Api:
    def list_repo_files(self, hub_id: str) -> list[str]:
        return ["unet/a.safetensors", "unet/a.bin", "README.md"]


class OfflineApi:
    def list_repo_files(self, hub_id: str) -> list[str]:
        raise ConnectionError("no network")


def test_an_id_has_an_owner_and_a_name_and_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert is_hub_id("stabilityai/stable-diffusion-2-1-base")
    assert not is_hub_id("models/mine")
    assert not is_hub_id("model.safetensors")
    assert not is_hub_id("a/b/c")
    assert not is_hub_id("C:\\models\\x")


def test_only_the_chosen_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(hub_id: str, **options: Any) -> str:
        asked.update(options, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    folder = download("owner/name", lambda files: [name for name in files if name.endswith(".safetensors")], "--vae")
    assert folder == tmp_path
    assert asked == {"id": "owner/name", "allow_patterns": ["unet/a.safetensors"]}


def test_without_a_network_an_earlier_copy_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(hub_id: str, local_files_only: bool = False, **_: Any) -> str:
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", OfflineApi)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert download("owner/name", lambda files: files, "--vae") == tmp_path


def test_without_a_network_or_a_copy_the_error_names_the_id_and_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(hub_id: str, **_: Any) -> str:
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "HfApi", OfflineApi)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match=r"--vae: 'owner/name' .* give the path of a local file or folder"):
        download("owner/name", lambda files: files, "--vae")
