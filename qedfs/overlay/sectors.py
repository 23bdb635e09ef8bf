"""Joins neighbours in the file: changed sectors of the tables into writes, and ranges. Pure: bytes in, bytes out."""

from __future__ import annotations

from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE

SECTOR_ENTRIES = SECTOR_SIZE // ENTRY_SIZE

Write = tuple[int, bytes]  # offset in the file, and the data


def joined_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent ranges (offset, size), in order of offset."""
    found: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((offset, size))
    return found


def joined(writes: list[Write]) -> list[Write]:
    """Join adjacent sectors, in order of offset. The last sector of L1 may be shorter, where the image ends."""
    found: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in sorted(writes):
        if offset == end:
            found[-1][1].append(data)
        else:
            found.append((offset, [data]))
        end = offset + len(data)
    return [(offset, b"".join(parts)) for offset, parts in found]
