"""Images are made smaller and edges are drawn, by the scripts as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import canny
import resize_images_to_resolution
from library.data.pixels import load_rgb, load_rgba

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A wide image with a caption, a small one, and a file that is none."""
    folder = tmp_path / "from"
    folder.mkdir()
    Image.new("RGB", (600, 300), "red").save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide one", encoding="utf-8")
    Image.new("RGB", (40, 50), "blue").save(folder / "小.jpg")
    (folder / "notes.md").write_text("notes", encoding="utf-8")
    return folder


def test_images_get_the_area_of_each_size_and_keep_their_shape(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    done = run("resize_images_to_resolution", folder, target, "--max_resolution", "200x200,64x64")
    assert done.returncode == 0, done.stderr
    assert names(target) == [
        "notes.md",
        "wide+200x200.jpg",
        "wide+64x64.jpg",
        "wide.png",
        "wide.txt",
        "小.jpg",
    ]
    assert Image.open(target / "wide+200x200.jpg").size == (283, 141)  # 39,903 pixels of 40,000
    assert Image.open(target / "wide+64x64.jpg").size == (91, 45)
    assert np.abs(load_rgb(target / "wide+200x200.jpg").astype(int) - (255, 0, 0)).max() <= 3
    assert (target / "小.jpg").read_bytes() == (folder / "小.jpg").read_bytes()


def test_sides_are_cut_to_multiples_and_captions_come_along(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    words = ["--max_resolution", "200,200,300,300", "--divisible_by", "32", "--copy_associated_files"]
    assert resize_images_to_resolution.main([str(folder), str(target), "--save_as_png", *words]) == 0
    assert Image.open(target / "wide+200x200.png").size == (256, 128)
    assert Image.open(target / "wide+300x300.png").size == (416, 192)
    assert (target / "wide+200x200.txt").read_text(encoding="utf-8") == "a wide one"
    assert Image.open(target / "小+200x200.png").size == (32, 32)  # not enlarged, only cut, and only once
    assert not (target / "小+300x300.png").exists()


def test_png_keeps_alpha_and_jpeg_cannot(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    Image.new("RGBA", (100, 100), (10, 200, 30, 128)).save(tmp_path / "from/x.png")
    for flags in ([], ["--save_as_png"]):
        words = [str(tmp_path / "from"), str(tmp_path / "to"), "--max_resolution", "50x50", *flags]
        assert resize_images_to_resolution.main(words) == 0
    assert load_rgba(tmp_path / "to/x+50x50.png")[0, 0].tolist() == [10, 200, 30, 128]
    assert Image.open(tmp_path / "to/x+50x50.jpg").mode == "RGB"


@pytest.mark.parametrize("interpolation", ["area", "cubic", "lanczos4", "nearest", "linear", "box"])
def test_every_interpolation_scales(tmp_path: Path, interpolation: str) -> None:
    (tmp_path / "from").mkdir()
    ramp = np.linspace(0, 255, 90)[None, :, None].repeat(60, 0).repeat(3, 2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "from/ramp.png")
    words = [str(tmp_path / "from"), str(tmp_path / "to"), "--save_as_png", "--max_resolution", "30x30"]
    assert resize_images_to_resolution.main([*words, "--interpolation", interpolation]) == 0
    small = load_rgb(tmp_path / "to/ramp+30x30.png").astype(int)
    assert small.shape == (24, 37, 3)
    assert np.abs(small[12, :, 0] - np.linspace(3, 252, 37)).max() <= 6


def test_a_folder_may_be_resized_in_place(folder: Path) -> None:
    assert resize_images_to_resolution.main([str(folder), str(folder), "--max_resolution", "64x64"]) == 0
    assert "wide+64x64.jpg" in names(folder) and Image.open(folder / "wide.png").size == (600, 300)


def test_images_that_cannot_be_read_are_listed_after_the_others_are_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "aa.png").write_bytes((folder / "wide.png").read_bytes()[:100])
    assert resize_images_to_resolution.main([str(folder), str(tmp_path / "to"), "--max_resolution", "64x64"]) == 1
    said = capsys.readouterr().err
    assert "1 of 3 images cannot be read" in said and "aa.png" in said and "Traceback" not in said
    assert (tmp_path / "to/wide+64x64.jpg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{nowhere}", "{to}"], "there is no such folder"),
        (["{empty}", "{to}"], "there are no images"),
        (["{folder}", "{to}", "--max_resolution", "512"], "--max_resolution: expected sizes such as"),
        (["{folder}", "{to}", "--max_resolution", "0x5"], "--max_resolution: expected sizes such as"),
        (["{folder}", "{to}", "--max_resolution", "5x5,"], "--max_resolution: expected sizes such as"),
        (["{folder}", "{to}", "--divisible_by", "48"], "leaves nothing with --divisible_by 48"),
        (["{twice}", "{to}"], "would both become a+512x512.jpg; rename one of them"),
    ],
)
def test_what_cannot_be_resized_gives_one_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    for name in ("empty", "twice"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (600, 600)).save(tmp_path / "twice" / name)
    places = {name: tmp_path / name for name in ("nowhere", "empty", "twice", "to")}
    assert resize_images_to_resolution.main([word.format(folder=folder, **places) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_edges_are_white_on_black(tmp_path: Path) -> None:
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    picture[:, 30:] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    done = run("canny", "--input", tmp_path / "x.png", "--output", tmp_path / "縁.png")
    assert done.returncode == 0, done.stderr
    edges = np.asarray(Image.open(tmp_path / "縁.png"))
    assert edges.shape == (40, 60) and set(np.unique(edges)) == {0, 255}
    assert set(np.nonzero(edges[20])[0]) <= {29, 30} and (edges[20] > 0).sum() == 1


def test_thresholds_decide_which_edges_are_drawn(tmp_path: Path) -> None:
    picture = np.full((40, 60, 3), 100, dtype=np.uint8)
    picture[:, 30:] = 130  # a weak edge
    Image.fromarray(picture).save(tmp_path / "x.png")
    for thresholds, is_drawn in ((("32", "224"), False), (("20", "60"), True)):
        words = ["--input", str(tmp_path / "x.png"), "--output", str(tmp_path / "y.png")]
        assert canny.main([*words, "--thres1", thresholds[0], "--thres2", thresholds[1]]) == 0
        assert bool(np.asarray(Image.open(tmp_path / "y.png")).any()) == is_drawn


def test_edges_of_a_whole_folder(folder: Path, tmp_path: Path) -> None:
    assert canny.main(["--input", str(folder), "--output", str(tmp_path / "edges")]) == 0
    assert names(tmp_path / "edges") == ["wide.png", "小.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "y.png"], "--input is missing"),
        (["--input", "{folder}/wide.png"], "--output is missing"),
        (["--input", "{folder}/none.png", "--output", "y.png"], "No such file"),
        (["--input", "{folder}/notes.md", "--output", "y.png"], "not an image"),
        (["--input", "{folder}/wide.png", "--output", "{folder}/y.xyz"], "expected a name that ends in"),
    ],
)
def test_what_has_no_edges_gives_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert canny.main([word.format(folder=folder) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
