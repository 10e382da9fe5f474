"""Forty image files that are not what they should be: read if they can be, else named in one error."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.checks import all_findings
from library.data.config import DatasetConfig, DatasetSettings, SubsetSettings
from library.data.dataset import TrainingSet, load_training_set
from library.data.items import BatchRequest
from library.data.report import Asked, collect

Content = bytes | Callable[[Path], None]


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A good picture of 64 x 48 pixels of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(content, kind, **options)
    return content.getvalue()


def cut(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


def spoilt(content: bytes, at: float, length: int = 40) -> bytes:
    start = int(len(content) * at)
    return content[:start] + bytes(length) + content[start + length :]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, each with a right checksum."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing at all"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


JPEG, PNG, WEBP, BMP = (encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP"))
ROWS = b"IDAT", zlib.compress(b"".join(b"\0" + bytes(range(12)) for _ in range(4)))
END = b"IEND", b""

UNREADABLE: dict[str, tuple[str, Content]] = {
    **{f"JPEG cut at {part}": ("x.jpg", cut(JPEG, part)) for part in (0.01, 0.1, 0.5, 0.9)},
    **{f"PNG cut at {part}": ("x.png", cut(PNG, part)) for part in (0.002, 0.01, 0.5, 0.99)},
    **{f"WebP cut at {part}": ("x.webp", cut(WEBP, part)) for part in (0.01, 0.5, 0.95)},
    **{f"BMP cut at {part}": ("x.bmp", cut(BMP, part)) for part in (0.001, 0.5)},
    "no bytes": ("x.png", b""),
    "one byte": ("x.jpg", b"\xff"),
    "text": ("x.png", b"this is no picture at all, it is a text\n" * 5),
    "a page": ("x.jpg", b"<!doctype html><html><body>404 Not Found</body></html>"),
    "zeros": ("x.webp", bytes(5000)),
    "the first byte changed": ("x.jpg", b"\x00" + JPEG[1:]),
    "the end of a photograph only": ("x.jpg", JPEG[-500:]),
    "an archive": ("x.png", b"PK\x03\x04" + bytes(500)),
    "a PNG of no width": ("x.png", png(header(0, 4), ROWS, END)),
    "a PNG of no pixels": ("x.png", png(header(4, 4), END)),
    "a PNG of a colour that is none": ("x.png", png(header(4, 4, 8, 5), ROWS, END)),
    "a PNG with a wrong checksum": ("x.png", spoilt(PNG, 0.0, 0)[:29] + b"\0\0\0\0" + PNG[33:]),
    "a PNG with broken pixels": ("x.png", spoilt(PNG, 0.5)),
    "a PNG that claims four billion pixels": ("x.png", png(header(2**16, 2**16), ROWS, END)),
    "a PNG that claims more than there can be": ("x.png", png(header(2**31 - 1, 2**31 - 1), ROWS, END)),
    "a BMP of no size": ("x.bmp", BMP[:18] + bytes(8) + BMP[26:]),
    "a JPEG without tables": ("x.jpg", JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") :]),
    "a GIF without pictures": ("x.png", b"GIF89a\x04\x00\x04\x00\x00\x00\x00;"),
    "a WebP of another kind": ("x.webp", b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(24)),
}
READABLE: dict[str, tuple[str, Content]] = {
    "a JPEG with something behind it": ("x.jpg", JPEG + b"thumbnail" * 50),
    "a JPEG called PNG": ("x.png", JPEG),
    "a GIF called PNG": ("x.png", encoded("GIF", "P")),
    "a profile that is none": ("x.jpg", encoded("JPEG", icc_profile=b"no profile" * 9)),
    "a profile that is none, in a PNG": ("x.png", encoded("PNG", icc_profile=b"x")),
    "an EXIF block that is none": ("x.jpg", encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "an EXIF block without an end": ("x.png", encoded("PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09")),
    "an EXIF turn that is none": (
        "x.jpg",
        encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0"),
    ),
    "an ending of capitals": ("x.PNG", PNG),
    "a palette with transparency": ("x.png", encoded("PNG", "P", transparency=0)),
    "grey with alpha": ("x.png", encoded("PNG", "LA")),
    "a CMYK photograph": ("x.jpg", encoded("JPEG", "CMYK")),
    "floating point of another program": ("x.png", encoded("TIFF", "F")),
}
EITHER: dict[str, tuple[str, Content]] = {
    "a palette that is too short": ("x.png", png(header(12, 4, 8, 3), (b"PLTE", bytes(3)), ROWS, END)),
    "a palette image without palette": ("x.png", png(header(12, 4, 8, 3), ROWS, END)),
    "a PNG of few pixels": ("x.png", png(header(4, 400), ROWS, END)),
    "broken pixels in a JPEG": ("x.jpg", spoilt(JPEG, 0.5)),
    "broken pixels in a WebP": ("x.webp", spoilt(WEBP, 0.5)),
}
NOT_FILES: dict[str, tuple[str, Content]] = {
    "a folder": ("x.png", folder),
    "a link to nothing": ("x.png", link_to_nothing),
    "a link to itself": ("x.png", link_to_itself),
}
ALL = UNREADABLE | READABLE | EITHER | NOT_FILES


def make(case: tuple[str, Content], root: Path) -> Path:
    name, content = case
    Image.new("RGB", (64, 64), "teal").save(root / "good.png")
    path = root / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if content is not folder and sys.platform == "win32":
            pytest.skip("links need a right of their own")
        content(path)
    return path


def config(root: Path) -> DatasetConfig:
    return DatasetConfig((DatasetSettings((64, 64), (SubsetSettings(root, class_tokens="x"),)),))


def show(data: TrainingSet) -> list[str]:
    """Make every picture, and name those that were made."""
    items = data.datasets[0].items
    shapes = [data[BatchRequest(0, (index,), (1,), 1, 0, 1)].pixels for index in range(len(items))]
    assert all(pixels is not None and pixels.shape == (1, 3, 64, 64) for pixels in shapes)
    return [item.path.name for item in items]


def test_there_are_forty_of_them() -> None:
    assert len(ALL) >= 40


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_broken_image_is_named_in_one_error(name: str, tmp_path: Path) -> None:
    path = make(UNREADABLE[name], tmp_path)
    with pytest.raises(ValueError) as caught:
        show(load_training_set(config(tmp_path)))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.count(str(path)) == 1 and "cannot be read" in message and "good.png" not in message
    assert len(message) < 600
    assert show(load_training_set(config(tmp_path), skip_corrupt=True)) == ["good.png"]


@pytest.mark.parametrize("name", READABLE)
def test_an_odd_image_is_read(name: str, tmp_path: Path) -> None:
    path = make(READABLE[name], tmp_path)
    for skip_corrupt in (False, True):
        assert show(load_training_set(config(tmp_path), skip_corrupt=skip_corrupt)) == ["good.png", path.name]


@pytest.mark.parametrize("name", EITHER)
def test_what_decoders_disagree_about_is_read_or_named(name: str, tmp_path: Path) -> None:
    path = make(EITHER[name], tmp_path)
    try:
        assert show(load_training_set(config(tmp_path))) == ["good.png", path.name]
    except ValueError as error:
        assert str(path) in str(error)
        assert show(load_training_set(config(tmp_path), skip_corrupt=True)) == ["good.png"]


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_file_is_no_image(name: str, tmp_path: Path) -> None:
    make(NOT_FILES[name], tmp_path)
    assert show(load_training_set(config(tmp_path))) == ["good.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything can be read by root")
def test_an_image_without_permission_is_named(tmp_path: Path) -> None:
    path = make(READABLE["grey with alpha"], tmp_path)
    path.chmod(0)
    with pytest.raises(ValueError, match=r"x\.png"):
        load_training_set(config(tmp_path))


def test_the_doctor_finds_all_that_are_broken_and_none_else(tmp_path: Path) -> None:
    places = {}
    for number, name in enumerate([*UNREADABLE, *READABLE]):
        (tmp_path / f"{number}").mkdir()
        places[name] = make(ALL[name], tmp_path / f"{number}")
    subsets = tuple(SubsetSettings(path.parent, class_tokens="x") for path in places.values())
    both = DatasetConfig((DatasetSettings((64, 64), subsets),))
    findings = {finding.kind: finding for finding in all_findings(collect(lambda: both, Asked()))}
    broken = {remark.name for remark in findings["corrupt"].remarks}
    assert broken == {str(places[name]) for name in UNREADABLE}
