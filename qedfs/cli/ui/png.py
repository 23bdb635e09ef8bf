"""Pixels of a few colours -> the bytes of a PNG file (RFC 2083, W3C Portable Network Graphics). Pure."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEXED = 3  # colour type: a pixel is an index into the palette
_BIT_DEPTH = 8
_NO_FILTER = b"\0"  # the filter type before every row
_HIGHEST_LEVEL = 9

Colour = tuple[int, int, int]


def encode_png(rows: Sequence[bytes | bytearray], palette: Iterable[Colour], description: str) -> bytes:
    """Encode rows of equal length, one byte per pixel, at most 256 colours. `description`: a text for viewers."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), _BIT_DEPTH, _INDEXED, 0, 0, 0)
    pixels = b"".join(part for row in rows for part in (_NO_FILTER, row))
    # iTXt: keyword, compression flag and method, language, translated keyword, then UTF-8.
    text = b"Description\0\0\0\0\0" + description.encode(errors="replace")
    chunks = [
        (b"IHDR", header),
        (b"PLTE", bytes(part for colour in palette for part in colour)),
        (b"iTXt", text),
        (b"IDAT", zlib.compress(pixels, _HIGHEST_LEVEL)),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
