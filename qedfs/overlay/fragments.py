"""In how many pieces the data of an overlay is, in the order of the image.

Owns the count. Reads tables only. Must not know how they are put in order (`relocation.py`).
"""

from __future__ import annotations

import dataclasses
from array import array

import trio

from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.table_rows import BEGIN, beginnings, is_scattered, rows_at
from qedfs.overlay.table_slices import TableSlices


@dataclasses.dataclass
class Fragments:
    """The data of an overlay, in bytes. Whoever reads it in the order of the image jumps to the start of each piece."""

    data: int = 0
    pieces: int = 0
    longest: int = 0
    _end: int = 0  # where the last piece ends in the file
    _size: int = 0  # of the last piece so far

    def add(self, entries: array[int], cluster_size: int) -> None:
        """Add the entries of the next clusters. 0.1 ms for 8192 of them in one row, 1.5 ms if they are scattered."""
        begins = beginnings(entries, cluster_size)
        if is_scattered(begins):
            self._add_scattered(array("Q", filter(ZERO.__lt__, entries)), cluster_size)
            return
        for _, entry, count in rows_at(entries, cluster_size, begins):
            if entry <= ZERO:
                continue
            size = count * cluster_size
            if entry == self._end:
                self._size += size
            else:
                self.pieces += 1
                self._size = size
            self.longest = max(self.longest, self._size)
            self.data += size
            self._end = entry + size

    def _add_scattered(self, places: array[int], cluster_size: int) -> None:
        """Add offsets of data. In a damaged overlay, the same offset twice counts as one piece."""
        if not places:
            return
        _, *rests = beginnings(places, cluster_size).split(bytes((BEGIN,)))
        sizes = [(1 + most) * cluster_size for most in (len(rests[0]), max(map(len, rests)), len(rests[-1]))]
        goes_on = places[0] == self._end
        before = self._size if goes_on else 0
        self.pieces += len(rests) - goes_on
        self.longest = max(self.longest, before + sizes[0], sizes[1])
        self._size = sizes[2] + (before if len(rests) == 1 else 0)
        self._end = places[-1] + cluster_size
        self.data += len(places) * cluster_size


async def fragments(tables: TableSlices, clusters: ClusterMap) -> Fragments:
    """Count the pieces of a whole overlay: 0.3 s for 1 TiB of data in order. Raises BadOverlay for an invalid table."""
    found = Fragments()
    cluster = 0
    while cluster < clusters.geometry.clusters:
        if gap := await clusters.gap(cluster):
            cluster += gap
            continue
        number, start = divmod(cluster, clusters.slice_entries)
        part = await tables.entries(number)
        inside = min(len(part), clusters.geometry.clusters - cluster + start)
        found.add(part[start:inside], clusters.geometry.cluster_size)
        cluster += inside - start
        await trio.lowlevel.checkpoint()
    return found
