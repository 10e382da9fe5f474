"""Files are whole or not there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.files.atomic import remove, replacing
from library.files.weights import save_safetensors
from tests.clients.small_disk import small_disk


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old", encoding="utf-8")
    with replacing(file) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert file.read_text(encoding="utf-8") == "old"
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
    assert file.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="half way"), replacing(file) as temporary:
        temporary.write_text("ne", encoding="utf-8")
        raise RuntimeError("half way")
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_user_s_umask_decides_who_may_read_a_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors writes
        save_safetensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "a.txt": 0o640,
        "a.safetensors": 0o640,
    }


def saved_by_torch(path: Path, **options: bool) -> None:
    with replacing(path) as temporary:
        torch.save({"a": torch.zeros(9000)}, temporary, **options)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit for the size of files")
@pytest.mark.parametrize(
    ("write", "number"),
    [
        (lambda path: save_safetensors({"a": torch.zeros(9000)}, path), errno.EFBIG),
        (lambda path: saved_by_torch(path), errno.EIO),
        (lambda path: saved_by_torch(path, _use_new_zipfile_serialization=False), errno.EFBIG),
    ],
    ids=["safetensors", "torch", "torch, former format"],
)
def test_a_system_that_does_not_write_is_an_os_error_whoever_writes(
    tmp_path: Path, write: Callable[[Path], None], number: int
) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old", encoding="utf-8")
    with small_disk(20_000), pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno == number
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_deleted_to_its_end_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "run-state"
    state.mkdir()
    (state / "model.safetensors").touch()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("library.files.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(state)
    assert [path.name.startswith(".run-state.") for path in tmp_path.iterdir()] == [True]
