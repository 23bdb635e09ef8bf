"""Which clusters of the file are referred to, before the space of a discarded one is used again.

Owns a walk over all tables, once in a session at most, and what it finds: leaks, and whether two entries refer to one
cluster. In such an overlay nothing is given back. Otherwise a discard of one of the two entries would destroy what the
other shows, and discards of both would free the place twice, for two new clusters. Must not know how space is given
back (`freed.py`).

The walk counts the entries as they were when the overlay was opened. It looks only at the part of the file that existed
then, because the allocator makes no two references to one place. Until it has ended, nothing in that part is allocated.
An entry may be replaced meanwhile only by a discard, which has its entries counted first (`before_discard`).

The walk begins with the first discard, or with a session that follows a kill, which leaves leaks: what was freed but
not used again, and what was written but had no entry yet.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator

import trio

from qedfs.errors import BadOverlay
from qedfs.format.geometry import round_down, round_up
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.table_rows import rows
from qedfs.overlay.table_slices import TableSlices
from qedfs.overlay.used_clusters import MAX_CLUSTERS, UsedClusters

log = logging.getLogger(__name__)

PIECE_CLUSTERS = 1024  # how many entries are counted at once, up to 1 ms on the event loop
_NO_ENTRIES = array("Q")


class References:
    """The references of one overlay. Runs on the event loop."""

    def __init__(self, tables: TableSlices, clusters: ClusterMap, header: Header, *, path: str, file_size: int) -> None:
        """`path`: for the log. `file_size`: at the opening."""
        self.problem = ""  # why nothing is given back; "" if nothing is wrong so far
        self.ended = False  # whether everything is known
        self._path = path
        self._tables = tables
        self._map = clusters
        self._header = header
        self._cluster_size = cluster_size = header.geometry.cluster_size
        self._piece = min(PIECE_CLUSTERS, clusters.slice_entries)
        self._end = round_up(file_size, cluster_size)
        self._whole_end = round_down(file_size, cluster_size)
        self._used: UsedClusters | None = None  # while a walk is under way
        self._l1_pages: list[tuple[int, array[int]]] = []  # that are left to be counted
        # Whole tables: what lies past the image's end is shown if another program enlarges the image.
        self._pieces = round_up(header.geometry.clusters, header.geometry.entries) // self._piece
        self._next = 0  # the pieces before it are counted
        self._ahead: set[int] = set()  # pieces after it that are counted, too

    @property
    def known(self) -> bool:
        """Whether the walk has ended, or was not needed yet."""
        return self.ended or self._used is None

    def begin(self) -> None:
        """Begin the walk, unless it has begun."""
        if self.ended or self._used is not None:
            return
        clusters = self._end // self._cluster_size
        if clusters > MAX_CLUSTERS:
            self._stop(f"the file claims {clusters} clusters, too many to tell which of them are in use")
            return
        self._used = UsedClusters(clusters)
        self._l1_pages = list(self._tables.l1.filled_pages())
        self._claim_table(self._header.l1_table_offset)

    def before_discard(self, first: int, count: int) -> None:
        """Count these clusters, whose entries are about to change. Their slices are in memory, or have no entries."""
        self.begin()
        if self.ended:
            return
        for piece in range(first // self._piece, (first + count - 1) // self._piece + 1):
            if piece < self._next or piece in self._ahead:
                continue
            number, at = divmod(piece * self._piece, self._map.slice_entries)
            self._count(self._tables.slices.get(number, _NO_ENTRIES)[at : at + self._piece])
            self._ahead.add(piece)

    async def look(self) -> None:
        """Go on with a walk that has begun, to its end. If it is cancelled, the next call continues there.

        Raises QedfsError if a table cannot be read. The next call tries again.
        """
        if self.known:
            return
        if self._l1_pages and not await self._tables.ends_with_image():
            # Another program would show their clusters if it enlarged the image, and so they are in use.
            self._stop("L1 entries lie past the end of the image")
        while self._l1_pages:
            self._count_tables(*self._l1_pages.pop())
            await trio.lowlevel.checkpoint()
        try:
            while not self.ended and self._next < self._pieces:
                await self._look_at_slice()
        except BadOverlay as exc:
            self._stop(str(exc).removesuffix("; run qedfs check"))
        if not self.ended:
            self.ended = True
            self._ahead.clear()

    async def _look_at_slice(self) -> None:
        cluster = self._next * self._piece
        if gap := await self._map.gap(cluster):
            self._next = -(-(cluster + gap) // self._piece)
            return
        number = cluster // self._map.slice_entries
        entries = await self._tables.entries(number)
        first = number * self._map.slice_entries
        # A discard may change the entries meanwhile. Then it has had them counted.
        while not self.ended and self._next * self._piece < first + len(entries):
            at = self._next * self._piece - first
            if self._next not in self._ahead:
                self._count(entries[at : at + self._piece])
            self._next += 1
            await trio.lowlevel.checkpoint()

    def leaks(self) -> Iterator[tuple[int, int]]:
        """After a walk that found nothing wrong: (offset, size) of what nothing referred to at the opening."""
        used, self._used = self._used, None
        if used is not None and not self.problem:
            for first, stop in used.unused(self._header.header_size, self._whole_end // self._cluster_size):
                yield first * self._cluster_size, (stop - first) * self._cluster_size

    def _count_tables(self, first: int, offsets: Iterable[int]) -> None:
        for index, offset in enumerate(offsets, first):
            if not offset or index in self._tables.unwritten or self.ended:
                continue
            if not valid_table_offset(offset, self._header, self._tables.file_end):
                self._stop(f"L1 entry {index} points to {offset:#x}, which is not a valid place for a table")
            elif offset < self._end:
                self._claim_table(offset)

    def _claim_table(self, offset: int) -> None:
        assert self._used is not None  # noqa: S101 - for the type checker; the walk is under way
        if self._used.claim_table(offset // self._cluster_size, self._header.geometry.table_size):
            self._stop(f"the table at {offset:#x} shares clusters with something else")

    def _count(self, entries: array[int]) -> None:
        if self._used is None:
            return
        cluster_size, end = self._cluster_size, self._end
        for _, first, count in rows(entries, cluster_size):
            if first <= ZERO or first >= end:  # those are of this session, or refused by every look-up
                continue
            if first % cluster_size or first < self._header.area_bytes:
                self._stop(f"an entry points to {first:#x}, which is not a valid place")
                return
            if not self._used.claim_row(first // cluster_size, min(count, (end - first) // cluster_size)):
                self._stop(f"two entries point to the cluster at {first:#x}, or to one soon after it")
                return

    def _stop(self, problem: str) -> None:
        log.warning("%s: the space of discarded clusters is not given back: %s; run qedfs check", self._path, problem)
        self.problem = problem
        self.ended = True
        self._used = None
        self._ahead.clear()
        self._l1_pages.clear()
