"""In how many pieces the data of an overlay is, in the order of the image.

Owns the count. Reads tables only. Must not know how they are put in order (`relocation.py`).
"""

from __future__ import annotations

import dataclasses
import operator
from itertools import pairwise

import trio

from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.table_slices import TableSlices


@dataclasses.dataclass
class Fragments:
    """The data of an overlay, in bytes. Whoever reads it in the order of the image jumps to the start of each piece."""

    data: int = 0
    pieces: int = 0
    longest: int = 0
    _end: int = 0  # where the last piece ends in the file
    _size: int = 0  # of the last piece so far

    def add(self, places: list[int], cluster_size: int) -> None:
        """Add the offsets of the next clusters with data. 1 ms for 8192 of them."""
        if not places:
            return
        follows = map(operator.sub, places[1:], places)
        breaks = [at for at, distance in enumerate(follows, 1) if distance != cluster_size]
        if places[0] == self._end:
            self._size += (breaks[0] if breaks else len(places)) * cluster_size
            self.longest = max(self.longest, self._size)
        else:
            breaks.insert(0, 0)
        self.pieces += len(breaks)
        for start, end in pairwise([*breaks, len(places)]):
            self._size = (end - start) * cluster_size
            self.longest = max(self.longest, self._size)
        self._end = places[-1] + cluster_size
        self.data += len(places) * cluster_size


async def fragments(tables: TableSlices, clusters: ClusterMap) -> Fragments:
    """Count the pieces of a whole overlay: 1.5 s for 1 TiB of data. Raises BadOverlay for an invalid table."""
    found = Fragments()
    cluster = 0
    while cluster < clusters.geometry.clusters:
        if gap := await clusters.gap(cluster):
            cluster += gap
            continue
        number, start = divmod(cluster, clusters.slice_entries)
        part = await tables.entries(number)
        inside = min(len(part), clusters.geometry.clusters - cluster + start)
        found.add([entry for entry in part[start:inside] if entry > ZERO], clusters.geometry.cluster_size)
        cluster += inside - start
        await trio.lowlevel.checkpoint()
    return found
