"""The size of an ordinary photograph from the first bytes of its file, in a fraction of a decoder's time to open it."""

from __future__ import annotations

import struct
from typing import BinaryIO

WINDOW, AHEAD = 4096, 512
"""Bytes that are read at once, and so many that should lie ahead: a frame header, or where an EXIF block begins."""
START = b"\xff\xd8"
FRAMES, OTHER_FRAMES = {0xC0, 0xC1, 0xC2}, {0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
"""Markers of frame headers (ITU-T T.81, table B.1): those that every decoder reads, and the others."""
TABLES, SCAN, EXIF, FILL = 0xDB, 0xDA, 0xE1, 0xFF
MOST_SEGMENTS = 100
ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
"""How a TIFF block begins -> the order of its bytes."""
ORIENTATION, SHORT = 0x0112, 3


def photograph_header(file: BinaryIO) -> tuple[tuple[int, int], int] | None:
    """Width and height of the JPEG in `file` as it is stored, and its EXIF orientation (1 to 8).

    None for all but the plain case, which is left to a decoder: another format, other than 8 bits a sample, no size,
    no tables, an EXIF block that is odd, a header that is cut off.
    """
    base, data = 0, file.read(WINDOW)
    if not data.startswith(START):
        return None
    place, size, turn, has_tables = len(START), None, None, False
    for _ in range(MOST_SEGMENTS):
        if place + AHEAD > base + len(data) and len(data) == WINDOW:
            file.seek(place)
            base, data = place, file.read(WINDOW)
        body = place - base + 4
        if body + 6 > len(data) or data[body - 4] != 0xFF or data[body - 3] in OTHER_FRAMES | {FILL}:
            return None
        marker, length = data[body - 3], int.from_bytes(data[body - 2 : body], "big")
        if marker == SCAN:
            return (size, turn or 1) if size and has_tables else None
        if marker in FRAMES:
            bits, height, width, planes = struct.unpack_from(">BHHB", data, body)
            if size or bits != 8 or planes not in (1, 3, 4) or not width or not height:
                return None
            size = (width, height)
        elif marker == EXIF and data.startswith(b"Exif\0\0", body) and turn is None:
            turn = _orientation(data[body + 6 : body + length - 2])
            if turn is None:
                return None
        has_tables |= marker == TABLES
        place += 2 + length
    return None


def _orientation(block: bytes) -> int | None:
    """The orientation that an EXIF block tells, 1 when it tells none; None when the block or the number is odd."""
    order = ORDERS.get(block[:4])
    if order is None:
        return None
    try:
        (first,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", block, place)
            if tag == ORIENTATION:
                return value if kind == SHORT and 1 <= value <= 8 else None
    except struct.error:
        return None
    return 1
