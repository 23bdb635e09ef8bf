"""Read a log of a disk's writes in the format of dm-log-writes, as QEMU's filter `blklogwrites` writes it.

Owns the layout of the log. Must not know what the bytes mean, nor what a power cut makes of them (`cuts.py`).

A superblock, alone in the first sector; then for each operation a sector that holds its entry, and behind it the data.
Fields are little-endian; places and lengths count sectors of the size that the superblock tells. Sources:
drivers/md/dm-log-writes.c of Linux, block/blklogwrites.c of QEMU.

The filter logs what has ended, so nobody knows where a flush began. It is taken to have begun where it ended: a write
that ended beside it counts as covered. That can hide a state in which the disk may be, and cannot invent one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.fakes.storage import BarrierBegun, BarrierEnded, Entry, Written

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH = 1  # flag of an entry: what had ended before it is on the disk

_SUPERBLOCK = struct.Struct("<QQQI")  # magic, version, entries up to the last flush, bytes of a sector
_ENTRY = struct.Struct("<QQQQ")  # first sector, sectors, flags, length of a mark's text


def read_log(log: bytes) -> Iterator[Entry]:
    """The writes and the barriers of a log, in the order in which they ended.

    Raises:
        ValueError: this is no such log, it is shorter than it says, or it holds what the filter does not write for an
            overlay (discards, marks, writes that are durable by themselves).
    """
    magic, version, count, sector_size = _unpack(_SUPERBLOCK, log, 0)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"no write log: magic {magic:#x}, version {version}")
    at = sector_size
    for number in range(count):
        sector, sectors, flags, _ = _unpack(_ENTRY, log, at)
        if flags & ~FLUSH:
            raise ValueError(f"entry {number} of the write log has flags {flags:#x}")
        at += sector_size
        if flags & FLUSH:
            yield BarrierBegun(number)
            yield BarrierEnded(number)
        if sectors:
            size = sectors * sector_size
            data = log[at : at + size]
            if len(data) < size:
                raise ValueError(f"the write log ends in the data of entry {number}")
            yield Written(sector * sector_size, data)
            at += size


def _unpack(layout: struct.Struct, log: bytes, at: int) -> tuple[int, ...]:
    if len(log) < at + layout.size:
        raise ValueError(f"the write log ends at {len(log)}, before what should be at {at}")
    return layout.unpack_from(log, at)
