"""Images are cut around the faces that a detector finds; without a detector it is said what to install."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import detect_face_rotate
from library.data.augment import face_of


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A detector of the shape of the real one: it finds two faces in wide images, none in others."""
    seen: list[np.ndarray] = []

    def create_detector(name: str, device: str) -> Any:
        assert name == "yolov3" and device in ("cpu", "cuda:0")
        return find

    def find(image: np.ndarray) -> list[dict[str, np.ndarray]]:
        seen.append(image)
        if image.shape[1] < image.shape[0]:
            return []
        return [face(50, 50, 20, 0.7), face(140, 60, 40, 0.9)]

    module = types.ModuleType("anime_face_detector")
    monkeypatch.setattr(module, "create_detector", create_detector, raising=False)
    monkeypatch.setitem(sys.modules, "anime_face_detector", module)
    return seen


def face(x: int, y: int, size: int, score: float) -> dict[str, np.ndarray]:
    points = np.zeros((28, 3), dtype=np.float32)
    points[11:17, :2], points[17:23, :2] = (x - 5, y), (x + 5, y)
    half = size / 2
    return {"bbox": np.array([x - half, y - half, x + half, y + half, score]), "keypoints": points}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "from"
    folder.mkdir()
    Image.new("RGB", (200, 100), (200, 10, 10)).save(folder / "花.png")
    Image.new("RGB", (100, 200), (200, 10, 10)).save(folder / "tall.png")
    return folder


def run(folder: Path, target: Path, *words: str) -> int:
    return detect_face_rotate.main(["--src_dir", str(folder), "--dst_dir", str(target), *words])


def test_the_surest_face_is_written_with_its_place(
    folder: Path, tmp_path: Path, detector: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "to", "--rotate", "--crop_size", "80,80") == 0
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["花_0040_0040_0040_0040.png"]
    assert Image.open(tmp_path / "to/花_0040_0040_0040_0040.png").size == (80, 80)
    assert detector[0][0, 0].tolist() == [10, 10, 200]  # the detector takes BGR
    said = capsys.readouterr().err
    assert "tall.png: no face is found" in said and "1 of 2 images show no face" in said


def test_every_face_gets_a_picture(folder: Path, tmp_path: Path, detector: list[np.ndarray]) -> None:
    assert run(folder, tmp_path / "to", "--multiple_faces", "--crop_ratio", "2,2", "--debug") == 0
    written = sorted((tmp_path / "to").iterdir())
    assert [path.name for path in written] == ["花_01_0040_0040_0040_0040.png", "花_02_0020_0020_0020_0020.png"]
    assert [Image.open(path).size for path in written] == [(80, 80), (40, 40)]
    assert face_of(written[1]) == (20, 20, 20, 20)
    assert np.asarray(Image.open(written[0]))[20, 40].tolist() == [255, 0, 255]  # the frame


def test_small_faces_can_be_left_out(folder: Path, tmp_path: Path, detector: list[np.ndarray]) -> None:
    assert run(folder, tmp_path / "to", "--multiple_faces", "--max_size", "30", "--resize_face_size", "10") == 0
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["花_01_0025_0025_0010_0010.png"]
    assert run(folder, tmp_path / "none", "--min_size", "41") == 0
    assert not (tmp_path / "none").exists()


def test_without_a_detector_it_is_said_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "anime_face_detector", None)
    assert run(folder, tmp_path / "to") == 1
    said = capsys.readouterr().err
    assert "pip install anime-face-detector" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dst_dir", "x"], "--src_dir is missing"),
        (["--src_dir", "{folder}"], "--dst_dir is missing"),
        (["--src_dir", "{folder}/none", "--dst_dir", "x"], "there is no such folder"),
        (["--src_dir", "{folder}", "--dst_dir", "x", "--resize_fit"], "--resize_fit needs --crop_size"),
    ],
)
def test_what_is_missing_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert detect_face_rotate.main([word.format(folder=folder) for word in words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--crop_size", "5"], ["--crop_ratio", "2,x"], ["--min_size", "0"]])
def test_wrong_values_are_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "to", *words)
    assert f"argument {words[0]}: expected" in capsys.readouterr().err


def test_a_broken_image_is_listed_and_the_others_are_done(
    folder: Path, tmp_path: Path, detector: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.png").write_bytes(b"no image")
    assert run(folder, tmp_path / "to") == 1
    assert "a.png: not an image" in capsys.readouterr().err
    assert len(list((tmp_path / "to").iterdir())) == 1
