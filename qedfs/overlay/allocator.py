"""The allocator: chooses where new clusters and tables go, at the end of the file or in place of a failed write.

Owns the end of the allocated space, and the list of free clusters. Must not know their contents.

A cluster is freed when its write has failed. At that point no thread writes to it any more, and no entry in memory, in
the journal or in a running group has ever referred to it. At the end of the file it is cut off, so that it reads as
zeros when the file grows again. Elsewhere it contains whatever part of the failed write has reached it. So it may only
be used for a cluster of which every byte is written. The entry of that cluster is published after the write, and
reaches the file after a barrier that covers both. Tables, and clusters whose unwritten part must read as zeros, always
go to the end. Free clusters are forgotten when the overlay is closed. They become leaks, which are harmless.
"""

from __future__ import annotations

from collections.abc import Iterable

from qedfs.errors import QedfsError
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices


class Allocator:
    """The allocator of one overlay. Runs on the event loop. Offsets and sizes are in bytes."""

    def __init__(self, storage: Storage, tables: TableSlices) -> None:
        self._storage = storage
        self._tables = tables
        self._cluster_size = tables.geometry.cluster_size
        self._free: list[int] = []  # offsets of free clusters, in ascending order

    def zeros(self, size: int) -> int:
        """Allocate `size` bytes, whole clusters, that read as zeros: at the end. Does not extend the file yet."""
        offset = self._tables.file_end
        self._tables.reach(offset + size)
        return offset

    def clusters(self, count: int) -> list[int]:
        """Allocate clusters of which every byte will be written: free ones first, then contiguous ones at the end."""
        taken, self._free = self._free[:count], self._free[count:]
        count -= len(taken)
        base = self.zeros(count * self._cluster_size)
        return taken + [base + index * self._cluster_size for index in range(count)]

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
        if end == self._tables.file_end:
            return
        if self._storage.size() > end:
            try:
                self._storage.resize(end)
            except QedfsError:
                return  # they stay in the list; the caller is about to report the error of the write
        self._tables.cut_back(end)
        del self._free[kept:]
