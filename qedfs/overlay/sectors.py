"""Joins changed sectors of the tables into writes to the file. Pure: bytes in, bytes out."""

from __future__ import annotations

from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE

SECTOR_ENTRIES = SECTOR_SIZE // ENTRY_SIZE

Write = tuple[int, bytes]  # offset in the file, and the data


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
