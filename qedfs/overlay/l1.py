"""Reads the L1 table of an overlay into memory, within the memory limit. Skips the holes of the file.

Owns the order of reads. Must not know what the entries mean. Waits for the disk.
"""

from __future__ import annotations

from qedfs.errors import NoMemory
from qedfs.format.geometry import ENTRY_SIZE, round_down
from qedfs.format.sparse import PAGE_BYTES, SparseTable
from qedfs.format.tables import decode_table
from qedfs.host.memory_pool import Share
from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import Storage
from qedfs.units import format_size

READ_BYTES = 64 << 10  # whole pages


def read_l1(storage: Storage, offset: int, length: int, share: Share) -> SparseTable:
    """Read the table of `length` entries at `offset` of the file. Its memory counts against `share`.

    Raises:
        NoMemory: the table does not fit into the memory limit.
    """
    table = SparseTable(length)
    holes = Holes(storage)
    at, end = 0, length * ENTRY_SIZE
    while at < end:
        # Skip whole pages of the sparse table only. If a page begins in a hole and ends in data, all of it is read.
        if hole := round_down(holes.at(offset + at), PAGE_BYTES):
            at += hole
            continue
        data = memoryview(bytearray(min(READ_BYTES, end - at)))
        if not share.fits(len(data)):
            raise NoMemory(
                f"its L1 table takes more than the {format_size(share.held_bytes)} of memory available for it"
            )
        storage.read(offset + at, data)
        table.load(at // ENTRY_SIZE, data, decode_table)
        share.take(table.held_bytes - share.held_bytes)
        at += len(data)
    return table
