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
harmless, and which a later session finds (`references.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from qedfs.errors import QedfsError
from qedfs.overlay.free_places import FreePlaces
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices


class Allocator:
    """The allocator of one overlay. Runs on the event loop. Offsets and sizes are in bytes."""

    def __init__(self, storage: Storage, tables: TableSlices) -> None:
        self._storage = storage
        self._tables = tables
        self._cluster_size = tables.geometry.cluster_size
        # What is freed beyond what they keep becomes a leak; if it is blank, it is punched all the same.
        self._free = FreePlaces(self._cluster_size)
        self._blank = FreePlaces(self._cluster_size)

    def zeros(self, size: int) -> int:
        """Allocate `size` bytes, whole clusters, that read as zeros: at the end. Does not extend the file yet."""
        offset = self._tables.file_end
        self._tables.reach(offset + size)
        return offset

    def clusters(self, count: int) -> list[int]:
        """Allocate clusters of which every byte will be written: free ones first, then contiguous ones at the end."""
        taken: list[int] = []
        for places in (self._free, self._blank):
            while len(taken) < count and (place := places.take()) is not None:
                taken.append(place)
        count -= len(taken)
        base = self.zeros(count * self._cluster_size)
        return taken + [base + index * self._cluster_size for index in range(count)]

    def blank(self) -> int:
        """Allocate one cluster that reads as zeros."""
        place = self._blank.take()
        return self.zeros(self._cluster_size) if place is None else place

    def low_blank(self, count: int, below: int) -> int | None:
        """Allocate the lowest `count` neighbouring blank clusters before offset `below`, if there are."""
        return self._blank.take_row(count, below)

    def make_table(self, cluster: int, reserve: int = 0) -> None:
        """Make sure that there is an L2 table for `cluster`, and its slice. The next commit writes the table.

        `reserve`: of how many clusters of this slice, from this one on, the commit must find space for the entries.

        Raises NoSpace: there is none to reserve, and nothing has changed.
        """
        index = self._tables.needs_table(cluster)
        if reserve:
            for offset, size in self._tables.sectors(cluster, reserve):
                self._storage.reserve(offset, size)
        if index is not None:
            self._tables.add_table(index, self.zeros(self._tables.geometry.table_bytes))
        self._tables.make_slice(cluster)

    def give_back(self, offsets: Iterable[int]) -> None:
        """Free clusters whose write has failed and ended."""
        self._free.add(offsets)
        # If that fails, they stay in the list. The caller is about to report the error of the write.
        self._cut_off(self._free)
        self._free.forget_some()  # after that, as it forgets the highest ones, which can be cut off

    def recycle(self, offsets: Iterable[int], *, blank: bool) -> None:
        """Free clusters that were discarded and that nothing refers to any more. `blank`: they read as zeros."""
        places = self._blank if blank else self._free
        places.add(offsets)
        if blank:
            self._cut_off(places)
        places.forget_some()  # as in `give_back`

    def _cut_off(self, places: FreePlaces) -> None:
        """Let the allocated space end before those of these places that are at its end."""
        file_end = self._tables.file_end
        end = places.beginning_at(file_end)
        if end == file_end or self._storage.would_wait():
            return  # not on the event loop
        try:
            if self._storage.size() > end:
                self._storage.resize(end)
        except QedfsError:
            return
        self._tables.cut_back(end)
        places.forget(end, file_end)
