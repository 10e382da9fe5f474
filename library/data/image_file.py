"""How an image file is opened, whatever it is called: by its content, at any size that is no trap."""

from __future__ import annotations

import importlib
import io
import threading
import warnings
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError, features

BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises on files that are not, or not wholly, an image."""

MOST_PIXELS = 2**30
"""32768x32768; a file of a few bytes may claim any size, and reading it would take all memory."""

LIMIT = threading.Lock()
"""Held while Pillow's own limit is lifted, so that every thread puts back what was there before."""

EXIF_ORIENTATION = 0x0112

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

ALWAYS_READ = ("png", "jpg", "jpeg", "webp", "bmp")
"""Endings, without the dot, of the images that every installation reads."""

READERS = {"avif": ("pillow_avif",), "jxl": ("pillow_jxl", "jxlpy.JXLImagePlugin")}
"""Ending -> modules that teach Pillow to read such images, the first that is installed."""
PACKAGES = {"avif": "pillow-avif-plugin", "jxl": "pillow-jxl-plugin"}
"""Ending -> what to install."""

HEAD = 12
"""Bytes by which the kinds of `READERS` are told."""
TAIL = 4096
"""Bytes at the end of a file in which its closing mark is looked for."""


def image_endings() -> frozenset[str]:
    """Endings of the images that can be read here, in lower or upper case but not mixed: `.png`, `.PNG`, ..."""
    names = [*ALWAYS_READ, *(kind for kind in READERS if has_reader(kind))]
    return frozenset(case for name in names for case in (f".{name}", f".{name.upper()}"))


def has_reader(kind: str) -> bool:
    """Whether images of `kind`, one of `READERS`, can be read here."""
    return (kind == "avif" and features.check("avif") is True) or any(_installed(module) for module in READERS[kind])


def open_image(file: BinaryIO | io.BytesIO) -> Image.Image:
    """The image in `file`, its header read; raises one of `BROKEN`."""
    image: Image.Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images and odd EXIF blocks are no news to the user
        try:
            image = Image.open(file)
        except Image.DecompressionBombError:
            image = _opened_whatever_its_size(file)
        except UnidentifiedImageError:
            _teach_pillow(file)
            image = Image.open(file)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"it claims to be {width}x{height} pixels, more than can be read; "
            f"scale it down to less than {MOST_PIXELS / 1e6:.0f} million pixels"
        )
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 from what the header holds; asking Pillow for more would decode a whole PNG."""
    block = image.info.get("exif")
    if not block or image.format == "JXL":  # JPEG XL turns its pixels itself, and its EXIF does not count
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        return int(exif.get(EXIF_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError):
        return 1


def ends_properly(file: BinaryIO | io.BytesIO, kind: str | None) -> bool:
    """Whether the closing mark of the format is where it should be; True for formats without one."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(HEAD)
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if kind == "BMP":
        return int.from_bytes(head[2:6], "little") <= length
    mark = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}.get(kind or "")
    file.seek(max(length - TAIL, 0))
    return mark is None or mark in file.read()


def reason(error: BaseException) -> str:
    """What is wrong with a file, from what was raised on reading it."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(error) or type(error).__name__


def _opened_whatever_its_size(file: BinaryIO | io.BytesIO) -> Image.Image:
    """What Image.open does without its limit of 179 million pixels, which holds for all of the process."""
    file.seek(0)
    with LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _teach_pillow(file: BinaryIO | io.BytesIO) -> None:
    """Load the plug-in for the image in `file`; ValueError says what to install, or that there is none."""
    file.seek(0)
    kind = _kind(file.read(HEAD))
    if kind is None:
        raise UnidentifiedImageError
    for module in READERS[kind]:
        if _installed(module):
            importlib.import_module(module)
            file.seek(0)
            return
    raise ValueError(f"it is an image of the kind {kind}; to read such images, pip install {PACKAGES[kind]}")


def _kind(head: bytes) -> str | None:
    if head.startswith(b"\xff\x0a") or head == b"\x00\x00\x00\x0cJXL \r\n\x87\n":
        return "jxl"
    return "avif" if head[4:] in (b"ftypavif", b"ftypavis") else None


def _installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None
