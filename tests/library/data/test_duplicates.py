"""Images that are the same are found, and only these."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from library.data.duplicates import Look, alike_images, equal_files, look_at, look_at_all


def drawing(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth picture of coloured clouds."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    picture.save(path)
    return picture


def looks(*paths: Path) -> dict[Path, Look]:
    return {path: look_at(path) for path in paths}


def test_equal_bytes_are_found_under_any_name(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    drawing(paths[0], 1)
    drawing(paths[2], 2)
    paths[1].write_bytes(paths[0].read_bytes())
    assert equal_files(looks(*paths)) == [paths[:2]]
    assert alike_images(looks(*paths)) == []


def test_another_format_size_sharpness_or_brightness_is_the_same_to_the_eye(tmp_path: Path) -> None:
    picture = drawing(tmp_path / "a.png", 1, (300, 200))
    picture.save(tmp_path / "b.jpg", quality=60)
    picture.resize((150, 100)).save(tmp_path / "c.png")
    picture.filter(ImageFilter.GaussianBlur(2)).save(tmp_path / "d.webp")
    picture.point(lambda value: min(value + 4, 255)).save(tmp_path / "e.png")
    paths = sorted(tmp_path.iterdir())
    assert equal_files(looks(*paths)) == [] and alike_images(looks(*paths)) == [paths]


def test_other_pictures_mirrored_ones_and_flat_colours_are_not_the_same(tmp_path: Path) -> None:
    for seed in range(40):
        drawing(tmp_path / f"{seed}.png", seed)
    Image.open(tmp_path / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    for colour in ("black", "white", "red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    assert alike_images(looks(*sorted(tmp_path.iterdir()))) == []


def test_a_turned_photograph_looks_as_its_upright_copy(tmp_path: Path) -> None:
    picture = drawing(tmp_path / "a.png", 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=exif, quality=95)
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    assert alike_images(looks(*paths)) == [paths]


def test_the_format_is_that_of_the_content_and_broken_files_give_their_reason(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "x.png", format="JPEG")
    cut = image(tmp_path / "cut.png", (64, 64))
    content = bytearray(cut.read_bytes())
    content[2000:2400] = bytes(400)
    cut.write_bytes(content)
    found = look_at_all([tmp_path / "x.png", cut, tmp_path / "missing.png"])
    first, second, third = found.values()
    assert isinstance(first, Look) and first.kind == "JPEG"
    assert isinstance(second, str) and isinstance(third, str) and "No such file" in third
    with pytest.raises(ValueError):
        look_at(cut)


def test_two_thousand_images_are_compared_in_a_moment() -> None:
    random = np.random.default_rng(0)
    signs = random.integers(0, 2**63, 2000).astype(np.uint64)
    signs[1500] = signs[3] ^ np.uint64(5)
    grey = np.full((8, 9, 3), 100, np.uint8)
    many = {Path(str(i)): Look(str(i), "PNG", sign, grey) for i, sign in enumerate(signs)}
    started = time.process_time()
    assert alike_images(many) == [[Path("3"), Path("1500")]]
    assert time.process_time() - started < 2
