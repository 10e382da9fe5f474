"""The header of a photograph says what a decoder says, or nothing."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.image_file import orientation
from library.data.image_header import photograph_header

NOISE = np.random.default_rng(0).integers(0, 256, (35, 61, 3), dtype=np.uint8)


def photograph(mode: str = "RGB", **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def exif(turn: int, order: str = "<", padding: int = 0) -> bytes:
    """An EXIF block with a camera's name before the orientation, and `padding` bytes for a preview behind."""
    rows = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"cam\0") + struct.pack(order + "HHIHH", 0x0112, 3, 1, turn, 0)
    begin = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + begin + struct.pack(order + "IH", 8, 2) + rows + bytes(4 + padding)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"optimize": True},
        {"comment": b"x" * 5000},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_the_size_is_read(mode: str, options: dict[str, Any]) -> None:
    assert photograph_header(io.BytesIO(photograph(mode, **options))) == ((61, 35), 1)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("padding", [0, 3000, 4050, 60_000])
def test_the_orientation_is_read_before_a_preview_and_a_profile(turn: int, order: str, padding: int) -> None:
    content = photograph(exif=exif(turn, order, padding), icc_profile=bytes(100_000))
    assert photograph_header(io.BytesIO(content)) == ((61, 35), turn)


@pytest.mark.parametrize("turn", [0, 9, 99])
def test_an_odd_orientation_is_left_to_others(turn: int) -> None:
    assert photograph_header(io.BytesIO(photograph(exif=exif(turn)))) is None


def test_other_formats_are_left_to_others() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        content = io.BytesIO()
        Image.fromarray(NOISE).save(content, kind)
        assert photograph_header(io.BytesIO(content.getvalue())) is None
    assert photograph_header(io.BytesIO(b"")) is None


WHOLE = photograph(exif=exif(6, ">"))


@settings(derandomize=True, database=None, deadline=None, max_examples=400)
@given(st.integers(0, 700), st.integers(0, 255), st.integers(0, 900))
def test_a_changed_or_cut_header_never_says_what_a_decoder_does_not(place: int, value: int, end: int) -> None:
    content = bytearray(WHOLE)
    content[place] = value
    spoilt = bytes(content[: len(content) if end > 700 else end])
    found = photograph_header(io.BytesIO(spoilt))
    if found is not None:
        try:
            image = Image.open(io.BytesIO(spoilt))
        except (OSError, SyntaxError):
            return  # a decoder finds faults in parts that say nothing of the size; it will, when it reads the image
        assert found == (image.size, orientation(image))
