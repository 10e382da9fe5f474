"""Reading, scaling and cropping against recorded pictures and odd files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from library.data.image_file import has_reader
from library.data.pixels import alpha_of, crop, image_size, load_rgb, load_rgba, make_picture, resize, to_pixels

FACTS = Path(__file__).resolve().parents[2] / "facts/dataset"
CASES = json.loads((FACTS / "images.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(FACTS / "images_expected.safetensors")


@pytest.mark.parametrize("case", [case for case in CASES if case["op"] == "resize"], ids=lambda case: case["key"])
def test_scaling_gives_the_recorded_pixels(case: dict[str, Any], recorded: dict[str, np.ndarray]) -> None:
    source = recorded["rgba_source" if case["key"].startswith("rgba") else "resize_source"]
    scaled = resize(source, tuple(case["to"]), case["interpolation"])
    difference = np.abs(scaled.astype(int) - recorded[case["key"]])
    # Equal in Pillow 13 and OpenCV 5; other versions of OpenCV may round one level apart.
    assert difference.max() <= 1 and scaled.shape == recorded[case["key"]].shape


@pytest.mark.parametrize("case", [case for case in CASES if case["op"] == "bucket_crop"], ids=lambda case: case["key"])
def test_crops_give_the_recorded_pixels(case: dict[str, Any], recorded: dict[str, np.ndarray]) -> None:
    scaled = resize(recorded[f"{case['key']}_source"], tuple(case["resized"]))
    middle = crop(scaled, tuple(case["bucket"]))
    anywhere = crop(scaled, tuple(case["bucket"]), Random(case["random_seed"]))
    assert np.abs(middle.astype(int) - recorded[case["key"]]).max() <= 1
    assert np.abs(anywhere.astype(int) - recorded[case["random_key"]]).max() <= 1


@pytest.mark.parametrize("target", [1, 7, 64, 999])
def test_nearest_rows_stay_inside_the_image(target: int) -> None:
    for source in range(1, 200):
        image = np.arange(source, dtype=np.uint8)[:, None, None].repeat(3, 2)
        scaled = resize(image, (1, target), "nearest")
        assert scaled.shape == (target, 1, 3)


def test_pixels_run_from_minus_one_to_one() -> None:
    picture = np.array([[[0, 255, 51]]], dtype=np.uint8)
    assert torch.allclose(to_pixels([picture]).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_an_image_is_turned_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16, 0] = 255  # red in the upper left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=100)
    loaded = load_rgb(path)
    assert image_size(path) == (32, 16) and loaded.shape == (16, 32, 3)
    assert loaded[2, 4, 0] > 200 and loaded[2, 28, 0] < 50 and loaded[13, 4, 0] < 50


def test_sixteen_bit_grey_becomes_eight_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_rgb(tmp_path / "deep.png")[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert load_rgb(path).tolist() == np.full((8, 8, 3), 255).tolist()


def test_alpha_is_dropped_and_hidden_colour_stays(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert load_rgb(tmp_path / "x.png")[0, 0].tolist() == [10, 20, 30]


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_rgb(tmp_path / "x.webp")[0, 0].tolist() == [255, 0, 0]


def test_a_jpeg_called_png_is_read_by_its_content(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "x.png", format="JPEG")
    assert image_size(tmp_path / "x.png") == (8, 6)
    assert load_rgb(tmp_path / "x.png").shape == (6, 8, 3)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.7])
def test_a_file_cut_short_is_found_out(tmp_path: Path, image: Callable[..., Path], name: str, part: float) -> None:
    path = image(tmp_path / name, (64, 64))
    content = path.read_bytes()
    assert image_size(path) == (64, 64)
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError):
        image_size(path)


@pytest.mark.parametrize("size", [(64, 48), (61, 47)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_a_photograph_is_decoded_as_pillow_does(tmp_path: Path, size: tuple[int, int], options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", **options)
    expected = np.asarray(Image.open(tmp_path / "x.jpg"))
    # The same library decodes in both; a build of another version may round one level apart.
    assert np.abs(load_rgb(tmp_path / "x.jpg").astype(int) - expected).max() <= 1


def test_a_photograph_that_is_cut_short_is_not_filled_up(tmp_path: Path, image: Callable[..., Path]) -> None:
    path = image(tmp_path / "x.jpg", (64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="truncated"):
        load_rgb(path)


def test_sixteen_bit_colour_becomes_eight_bit(tmp_path: Path) -> None:
    deep = np.array([[[0, 32896, 65535]]], dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[:, :, ::-1])
    assert load_rgb(tmp_path / "deep.png")[0, 0].tolist() == [0, 128, 255]


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert load_rgb(tmp_path / "dark.png").max() == 0


def test_alpha_is_the_last_channel(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 51)).save(tmp_path / "x.png")
    picture = load_rgba(tmp_path / "x.png")
    assert picture[0, 0].tolist() == [10, 20, 30, 51]
    assert alpha_of(picture).dtype == np.float32 and np.allclose(alpha_of(picture), 0.2)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "I;16"])
def test_an_image_without_alpha_is_opaque(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    blank = Image.new("L", (4, 4), 255)
    (Image.fromarray(np.full((4, 4), 65535, np.uint16)) if mode == "I;16" else blank.convert(mode)).save(path)
    assert load_rgba(path).tolist() == np.full((4, 4, 4), 255).tolist()


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_colour_is_alpha(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (2, 1), (0, 0, 0))
    picture.putpixel((1, 0), (255, 255, 255))
    picture = picture.convert(mode)
    transparent = {"L": 255, "RGB": (255, 255, 255)}.get(mode, picture.getpixel((1, 0)))
    picture.save(tmp_path / "x.png", transparency=transparent)
    assert load_rgba(tmp_path / "x.png")[0].tolist() == [[0, 0, 0, 255], [255, 255, 255, 0]]
    assert load_rgb(tmp_path / "x.png")[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_picture_has_alpha_when_it_is_asked_for(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 20), (255, 255, 255, 102)).save(tmp_path / "x.png")
    picture = make_picture(tmp_path / "x.png", (20, 10), (10, 10), alpha=True)
    assert picture.shape == (10, 10, 4) and np.allclose(alpha_of(picture), 0.4)
    assert make_picture(tmp_path / "x.png", (20, 10), (10, 10)).shape == (10, 10, 3)


@pytest.mark.parametrize("name", ["图像.png", "пёс.jpg", "صورة.webp", "naïve ‘x’.bmp", "犬" * 60 + ".png"])
def test_names_may_be_in_any_script(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 6), "white").save(tmp_path / name)
    assert image_size(tmp_path / name) == (8, 6) and load_rgb(tmp_path / name).min() > 250


@pytest.mark.skipif(not has_reader("avif"), reason="no reader of AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_read(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (32, 16), "red")
    picture.save(tmp_path / "x.avif", exif=exif, quality=90)
    size = (32, 16) if orientation == 1 else (16, 32)
    assert image_size(tmp_path / "x.avif") == size
    assert load_rgb(tmp_path / "x.avif").shape == (size[1], size[0], 3)


def test_the_first_frame_of_a_gif_with_another_name_is_read(tmp_path: Path) -> None:
    frames = [Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    frames[0].save(tmp_path / "x.png", format="GIF", save_all=True, append_images=frames[1:])
    assert load_rgb(tmp_path / "x.png")[0, 0].tolist() == [255, 0, 0]


def test_every_level_and_every_view_becomes_the_number_of_the_formula() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    pictures = [picture[3:33, 5:45], picture[3:33, 5:45][:, ::-1], picture[:30, 10:]]
    expected = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    pixels = to_pixels(pictures)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous() and torch.equal(pixels, expected)
    assert to_pixels([np.arange(256, dtype=np.uint8).reshape(16, 16, 1)]).unique().numel() == 256
