"""Zeros in the overlay file: whether a range has only zeros, and how it gets them. Skips the holes of the file.

Must not know what the bytes mean. Waits for the disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import Storage

PIECE_BYTES = 64 << 10  # to read at once
_ZEROS = bytes(PIECE_BYTES)


def is_zero(storage: Storage, offset: int, size: int) -> bool:
    """Whether these bytes of the file are all zeros."""
    return next(_filled(storage, offset, size), None) is None


def write_zeros(storage: Storage, offset: int, size: int) -> None:
    """Write zeros over whatever is not zero there."""
    for at, data in _filled(storage, offset, size):
        storage.write(at, [bytes(len(data))])


def _filled(storage: Storage, offset: int, size: int) -> Iterator[tuple[int, bytearray]]:
    """The pieces of a range that are not all zeros, each with its offset."""
    holes, end = Holes(storage), offset + size
    while offset < end:
        if hole := holes.at(offset):
            offset += hole
            continue
        data = bytearray(min(PIECE_BYTES, end - offset))
        storage.read(offset, memoryview(data))
        if not _ZEROS.startswith(data):
            yield offset, data
        offset += len(data)
