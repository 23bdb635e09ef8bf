"""Where in the file new clusters and tables go: behind everything that is in use, or where a write has failed.

Owns the end of the allocated space and the places that are free again. Must not know what comes where.

A place is given back when its write has failed: no thread writes to it any more, and no entry, in memory, in the
journal or in a group under way, has ever named it. At the end of the file it is cut off, and reads as zeros when the
file grows again. Elsewhere it keeps whatever part of the failed write has reached it. So only a cluster of which every
byte is written may go there: its entry is published behind that write, and reaches the file behind a barrier that
covers both writes. Tables, and clusters whose unwritten part counts as zeros, always go to the end. The free places are
forgotten at the close: what is left of them then are leaks, which harm nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

from qedfs.errors import QedfsError
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices


class Allocator:
    """Allocation in one overlay, on the event loop. Offsets and sizes in bytes."""

    def __init__(self, storage: Storage, tables: TableSlices) -> None:
        self._storage = storage
        self._tables = tables
        self._cluster_size = tables.geometry.cluster_size
        self._free: list[int] = []  # clusters, in rising order

    def zeros(self, size: int) -> int:
        """A place of `size` bytes, whole clusters, that reads as zeros: at the end. The file is not grown yet."""
        offset = self._tables.file_end
        self._tables.reach(offset + size)
        return offset

    def clusters(self, count: int) -> list[int]:
        """Places for clusters of which every byte will be written: free ones, then a row at the end."""
        taken, self._free = self._free[:count], self._free[count:]
        count -= len(taken)
        base = self.zeros(count * self._cluster_size)
        return taken + [base + index * self._cluster_size for index in range(count)]

    def make_table(self, cluster: int) -> None:
        """Have an L2 table and its slice for `cluster`; the table becomes part of the file with the next commit."""
        index = self._tables.needs_table(cluster)
        if index is not None:
            self._tables.add_table(index, self.zeros(self._tables.geometry.table_bytes))
        self._tables.make_slice(cluster)

    def give_back(self, offsets: Iterable[int]) -> None:
        """Undo the allocation of clusters whose write has failed and has ended."""
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
                return  # they stay as free places; the caller is about to report the write's own error
        self._tables.cut_back(end)
        del self._free[kept:]
