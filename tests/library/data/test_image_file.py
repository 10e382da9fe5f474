"""Files are opened by their content, up to a size that is a trap."""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from library.data import image_file
from library.data.image_file import has_reader, image_endings, open_image
from library.data.pixels import image_size, load_rgb


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says whatever it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_an_image_of_twenty_thousand_pixels_a_side_is_measured(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_that_claims(20000, 20000))
    assert image_size(tmp_path / "large.png") == (20000, 20000)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_an_image_above_the_limit_of_pillow_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    Image.new("RGB", (64, 48), "white").save(tmp_path / "large", format=kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large")
    assert load_rgb(tmp_path / "large").tolist() == np.full((48, 64, 3), 255).tolist()
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 2**31 - 1), (2**30, 2)])
def test_a_file_that_claims_to_be_enormous_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_that_claims(*size))
    for read in (image_size, load_rgb):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels, more than can be read"):
            read(tmp_path / "bomb.png")


def test_a_file_of_the_largest_size_that_holds_little_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "short.png"
    path.write_bytes(png_that_claims(300, 300))
    with pytest.raises(ValueError):
        load_rgb(path)


@pytest.mark.parametrize("head", [b"\xff\x0a" + bytes(30), b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(30)])
def test_a_jpeg_xl_without_a_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(image_file, "_installed", lambda module: False)
    (tmp_path / "x.png").write_bytes(head)
    with pytest.raises(ValueError, match="pip install pillow-jxl-plugin"):
        image_size(tmp_path / "x.png")
    assert not has_reader("jxl") and not {".jxl", ".JXL"} & image_endings()


def test_a_jpeg_xl_is_read_by_the_plugin_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin(ImageFile.ImageFile):
        format = "JXL"

        def _open(self) -> None:
            self._mode, self._size = "L", (6, 4)
            self.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
            self.tile = [ImageFile._Tile("raw", (0, 0, 6, 4), 2, "L")]

    def register(name: str) -> types.ModuleType:
        assert name == "jxlpy.JXLImagePlugin"
        Image.register_open("JXL", Plugin, lambda head: head[:2] == b"\xff\x0a")
        return sys

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(image_file, "_installed", lambda module: module.startswith("jxlpy"))
    monkeypatch.setattr("importlib.import_module", register)
    path = tmp_path / "x.jxl"
    path.write_bytes(b"\xff\x0a" + bytes([77]) * 24)
    assert image_size(path) == (6, 4)  # its EXIF says that it is turned; that of a JPEG XL does not count
    assert load_rgb(path).tolist() == np.full((4, 6, 3), 77).tolist()
    assert {".jxl", ".JXL"} < image_endings()


def test_endings_are_not_of_mixed_case() -> None:
    assert {".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp", ".BMP"} <= image_endings()
    assert not {".Png", ".gif", ".tiff", ".txt"} & image_endings()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF", bytes(5000), b"text" * 999])
def test_what_is_no_image_gives_one_plain_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for read in (image_size, load_rgb):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "x.png")
        assert "\n" not in str(caught.value) and str(caught.value)


def test_the_header_alone_is_read_at_first() -> None:
    content = io.BytesIO()
    Image.new("RGB", (300, 200)).save(content, format="PNG")
    opened = open_image(io.BytesIO(content.getvalue()[:60]))
    assert opened.size == (300, 200)
