"""Lays out all tables of a new overlay in one row, and reserves space for its data.

Owns where the tables lie, and how space is reserved. Must not know when (`create.py`).

All L2 tables follow the L1 table, in the order of the image. So no write allocates a table, and a walk over the map
reads one stretch of the file. The tables are holes of the file until they have entries: a range of the image without
data costs nothing but its L1 entry. The space for data is reserved past the end of the file, where new clusters go.
"""

from __future__ import annotations

import enum
import errno
import os
from array import array
from typing import BinaryIO

from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.header import Header
from qedfs.format.tables import encode_table
from qedfs.host.fallocate import KEEP_SIZE, fallocate

_ENTRIES_AT_ONCE = 1 << 16


class Preallocation(enum.StrEnum):
    """What a new overlay gets ahead."""

    OFF = "off"  # tables and data get their place when they are needed
    METADATA = "metadata"  # all tables have their place
    FALLOC = "falloc"  # likewise, and the file has space on the disk for tables and data of the whole image


def write_tables(file: BinaryIO, header: Header) -> int:
    """Write L1 entries for tables in one row after the L1 table. Returns where the last of them ends."""
    geometry = header.geometry
    size, first = geometry.table_bytes, header.l1_table_offset + geometry.table_bytes
    for index in range(0, geometry.l1_used, _ENTRIES_AT_ONCE):
        stop = min(index + _ENTRIES_AT_ONCE, geometry.l1_used)
        file.seek(header.l1_table_offset + index * ENTRY_SIZE)
        file.write(encode_table(array("Q", range(first + index * size, first + stop * size, size))))
    return first + geometry.l1_used * size


def reserve(fd: int, size: int) -> None:
    """Give the file space on the disk for its first `size` bytes. Its length stays. Raises OSError, like ENOSPC."""
    while number := fallocate(fd, KEEP_SIZE, 0, size):
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
