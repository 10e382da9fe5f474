"""Files are whole or not there."""

from pathlib import Path

import pytest

from library.files.atomic import replacing


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
