"""Small qcow2 images put together by hand, for what qemu-img would not make."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

COPIED, COMPRESSED = 1 << 63, 1 << 62


def header(  # noqa: PLR0913 - the fields of a header
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: tuple[int, int] = (0, 0),
    cluster_bits: int = 9,
    size: int = 64 << 10,
    crypt: int = 0,
    l1_size: int = 2,
    l1_offset: int = 512,
    features: int = 0,
    length: int = 104,
    compression: int | None = None,
) -> bytes:
    """A header of `length` bytes."""
    fixed = struct.pack(">4sIQIIQIIQ", magic, version, *backing, cluster_bits, size, crypt, l1_size, l1_offset)
    later = struct.pack(">QIIQQQQII", 0, 0, 0, 0, features, 0, 0, 4, length)
    whole = fixed + later
    if compression is not None:
        whole += bytes([compression]) + bytes(7)
    return whole


def image(
    tables: Mapping[int, list[int]],
    clusters: Mapping[int, bytes] | None = None,
    *,
    file_size: int = 64 << 10,
    **fields: int,
) -> bytes:
    """A file with clusters of 512 bytes: `tables` holds u64 entries and `clusters` bytes, by offset."""
    content = bytearray(file_size)
    content[:104] = header(**fields)  # type: ignore[arg-type]
    for offset, entries in tables.items():
        content[offset : offset + 8 * len(entries)] = struct.pack(f">{len(entries)}Q", *entries)
    for offset, data in (clusters or {}).items():
        content[offset : offset + len(data)] = data
    return bytes(content)


def deflated(data: bytes) -> bytes:
    """Without a header, in a window of 4 KiB, as QEMU writes it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def packed_entry(offset: int, size: int, cluster_bits: int = 9) -> int:
    """The descriptor of a compressed cluster."""
    further = (offset + size - 1) // 512 - offset // 512
    return COMPRESSED | further << (62 - (cluster_bits - 8)) | offset
