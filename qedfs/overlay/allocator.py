"""The allocator: chooses where new clusters and tables go, at the end of the file or in place of a failed write.

Owns the end of the allocated space, and the lists of free clusters. Must not know their contents.

A cluster is freed when its write has failed. At that point no thread writes to it any more, and no entry in memory, in
the journal or in a running group has ever referred to it. At the end of the file it is cut off, so that it reads as
zeros when the file grows again. Elsewhere it contains whatever part of the failed write has reached it. So it may only
be used for a cluster of which every byte is written. The entry of that cluster is published after the write, and
reaches the file after a barrier that covers both.

A cluster is *blank* if a discard has freed it and it was punched out of the file (`freed.py`). It reads as zeros, and
may be used for a cluster of which a part is written. The barrier before the entry covers the hole as well.

Tables always go to the end. Free clusters are forgotten when the overlay is closed. They become leaks, which are
harmless.
"""

from __future__ import annotations

from collections.abc import Iterable

from qedfs.errors import QedfsError
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices

# Blank clusters to remember: some MiB of memory. What is freed beyond is punched and becomes a leak.
MOST_BLANK = 1 << 17


class Allocator:
    """The allocator of one overlay. Runs on the event loop. Offsets and sizes are in bytes."""

    def __init__(self, storage: Storage, tables: TableSlices) -> None:
        self._storage = storage
        self._tables = tables
        self._cluster_size = tables.geometry.cluster_size
        self._free: list[int] = []  # offsets of free clusters, in ascending order
        self._blank: list[int] = []  # of blank ones, in descending order

    def zeros(self, size: int) -> int:
        """Allocate `size` bytes, whole clusters, that read as zeros: at the end. Does not extend the file yet."""
        offset = self._tables.file_end
        self._tables.reach(offset + size)
        return offset

    def clusters(self, count: int) -> list[int]:
        """Allocate clusters of which every byte will be written: free ones first, then contiguous ones at the end."""
        taken, self._free = self._free[:count], self._free[count:]
        while self._blank and len(taken) < count:
            taken.append(self._blank.pop())
        count -= len(taken)
        base = self.zeros(count * self._cluster_size)
        return taken + [base + index * self._cluster_size for index in range(count)]

    def blank(self) -> int:
        """Allocate one cluster that reads as zeros."""
        return self._blank.pop() if self._blank else self.zeros(self._cluster_size)

    def make_table(self, cluster: int) -> None:
        """Make sure that there is an L2 table for `cluster`, and its slice. The next commit writes the table."""
        index = self._tables.needs_table(cluster)
        if index is not None:
            self._tables.add_table(index, self.zeros(self._tables.geometry.table_bytes))
        self._tables.make_slice(cluster)

    def give_back(self, offsets: Iterable[int]) -> None:
        """Free clusters whose write has failed and ended."""
        self._free = sorted([*self._free, *offsets])
        end = self._tables.file_end
        kept = len(self._free)
        while kept and self._free[kept - 1] == end - self._cluster_size:
            kept -= 1
            end = self._free[kept]
        # If that fails, they stay in the list. The caller is about to report the error of the write.
        if self._cut_off(end):
            del self._free[kept:]

    def recycle(self, offsets: Iterable[int], *, blank: bool) -> None:
        """Free clusters that were discarded and that nothing refers to any more. `blank`: they read as zeros."""
        if not blank:
            self._free = sorted([*self._free, *offsets])[:MOST_BLANK]
            return
        self._blank = sorted([*self._blank, *offsets], reverse=True)
        end = self._tables.file_end
        cut = 0
        while cut < len(self._blank) and self._blank[cut] == end - self._cluster_size:
            end = self._blank[cut]
            cut += 1
        if self._cut_off(end):
            del self._blank[:cut]
        del self._blank[: max(0, len(self._blank) - MOST_BLANK)]

    def _cut_off(self, end: int) -> bool:
        """Let the allocated space end here, where only free clusters follow."""
        if end == self._tables.file_end:
            return False
        try:
            if self._storage.size() > end:
                self._storage.resize(end)
        except QedfsError:
            return False
        self._tables.cut_back(end)
        return True
