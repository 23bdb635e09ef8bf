"""Marks the entries of a truncated overlay that point past its end, so that they never become valid again.

An overlay is truncated, for example, when a copy of it hits a full disk. As the file grows again, an entry past the old
end would point to another cluster's data, or to something that is taken for a table. So it is marked while it can be
distinguished from the entries of this session. A marked entry points into the middle of a cluster. QEMU and qedfs
reject it whatever the length of the file, and its old value is still recognizable.

Marks are written as soon as they are found, and made durable before anything more is allocated. So neither a kill nor a
power cut leaves a grown file without the marks. While a mark cannot be written, nothing is allocated. One case goes
unnoticed: entries in slices that no session has read before the file grew past them. A session that has counted its
clusters has read all of them.

An overlay with such entries has lost data, so it is never complete: `lost` counts them, including those marked by an
earlier session. Owns the format of the mark, and which slices have been examined. Must not know when entries are read
or written.
"""

from __future__ import annotations

import sys
from array import array

from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.tables import ZERO
from qedfs.overlay.ranges import Ranges
from qedfs.overlay.table_rows import reaches

_MARK = 2  # 0 is a missing cluster, 1 a zero cluster; every offset is a multiple of 4 KiB
_LOW_BYTE = 0 if sys.byteorder == "little" else ENTRY_SIZE - 1  # position of the low byte of an entry in memory
_SOUND = bytes((0, ZERO))  # the low bytes of valid entries


class Truncation:
    """The truncated entries of one overlay. `end`: where its last whole cluster ended at the opening, in bytes."""

    def __init__(self, end: int, cluster_size: int) -> None:
        self.end = end
        self._cluster_size = cluster_size
        self._judged = Ranges()  # the examined slices. A forged overlay may have 2^29 of them, and a count reads all.
        self.lost = 0  # invalid entries in the examined slices

    def grown_to(self, end: int) -> None:
        """Accept entries up to here: another process has let the file grow since the opening."""
        self.end = max(self.end, end)

    def concerns(self, part: array[int]) -> bool:
        """Whether a slice has entries past `end`, of whatever origin, or marked ones."""
        return reaches(part, self.end) or bool(_marked_low_bytes(part))

    def marked(self, number: int, part: array[int]) -> list[int]:
        """Mark the bad entries of a slice that was read from the file. Returns their indices, to be written.

        Only does so when the slice is read for the first time, because later it may have entries of this session.
        """
        if self._judged.end_of(number) is not None:
            return []
        self._judged.add(number, number + 1)
        bad = mark_beyond(part, self.end, self._cluster_size)
        if low_bytes := _marked_low_bytes(part):
            self.lost += len(low_bytes) - sum(map(low_bytes.count, _SOUND))
        return bad


def mark_beyond(table: array[int], limit: int, cluster_size: int) -> list[int]:
    """Mark the offsets at or past `limit`, and return their indices. Unaligned offsets are invalid as they are."""
    if not reaches(table, limit):
        return []
    bad = [index for index, entry in enumerate(table) if entry >= limit and entry % cluster_size == 0]
    for index in bad:
        table[index] |= _MARK
    return bad


def _marked_low_bytes(table: array[int]) -> bytes:
    """The low bytes of the entries from the first to the last marked one. Takes 8 us for 64 KiB."""
    return table.tobytes()[_LOW_BYTE::ENTRY_SIZE].strip(_SOUND)
