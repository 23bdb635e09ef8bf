"""An overlay that was cut, as by a copy that met a full disk: entries behind its end, which must not become good later.

Owns the mark, and which slices have been looked at. As the file grows, such an entry would come to point into a cluster
of somebody else, or at what would be taken for a table; so it is marked while it can be told from an entry of this
session. A marked entry points into the middle of a cluster: qedfs and QEMU refuse it in a file of any length, and its
old value can be read off it. The committer writes the marks when they are found, and has a barrier behind them before
anything more is allocated: neither a kill nor a power cut leaves the growth without the marks that came before it.
Where one cannot be written, nothing is allocated until it can.
What this does not tell: entries in slices that no session has read before the file grew over them. A session that has
counted its clusters has read all of them.

An overlay with such entries has lost something, and is not complete whatever it needs no more: `lost` counts them, and
those that an earlier session has marked. Must not know when entries are read or written.
"""

from __future__ import annotations

import sys
from array import array

from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.tables import ZERO
from qedfs.overlay.ranges import Ranges

_MARK = 2  # 0 is a missing cluster, 1 a zero cluster; every offset is a multiple of 4 KiB
_LOW_BYTE = 0 if sys.byteorder == "little" else ENTRY_SIZE - 1  # of an entry in memory
_SOUND = bytes((0, ZERO))  # what it is in every entry that can be


class Truncation:
    """What one overlay was like when it was opened: `end` of its last whole cluster, in bytes."""

    def __init__(self, end: int, cluster_size: int) -> None:
        self.end = end
        self._cluster_size = cluster_size
        self._judged = Ranges()  # of slices: a claim may have 2^29 of them, which a count goes through
        self.lost = 0  # entries that lead nowhere, in the slices that have been judged

    def concerns(self, part: array[int]) -> bool:
        """Whether a slice has entries behind the end of then, of whatever origin, or marked ones."""
        return max(part, default=0) >= self.end or bool(_marked_low_bytes(part))

    def marked(self, number: int, part: array[int]) -> list[int]:
        """Mark what is bad in a slice that was read from the file; the indices, which the file now needs to get.

        At the first reading only: a later one may find entries of this session.
        """
        if self._judged.end_of(number) is not None:
            return []
        self._judged.add(number, number + 1)
        bad = mark_beyond(part, self.end, self._cluster_size)
        if low_bytes := _marked_low_bytes(part):
            self.lost += len(low_bytes) - sum(map(low_bytes.count, _SOUND))
        return bad


def mark_beyond(table: array[int], limit: int, cluster_size: int) -> list[int]:
    """Mark the offsets at or behind `limit`; returns their indices. Between two clusters they are bad as they are."""
    # `max` over 64 KiB: 0.2 ms.
    if max(table, default=0) < limit:
        return []
    bad = [index for index, entry in enumerate(table) if entry >= limit and entry % cluster_size == 0]
    for index in bad:
        table[index] |= _MARK
    return bad


def _marked_low_bytes(table: array[int]) -> bytes:
    """The low bytes of the entries from the first to the last marked one; 8 us over 64 KiB."""
    return table.tobytes()[_LOW_BYTE::ENTRY_SIZE].strip(_SOUND)
