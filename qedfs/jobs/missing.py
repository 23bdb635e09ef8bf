"""What of an image still has to cross the wire: its missing clusters, without the holes of the source.

Owns what the source has told of its holes, and which tables lie in one. Must not know when a request may leave.

Where the source has a hole, zero entries are set and nothing crosses the wire; a stretch without L2 table over a hole
is passed over, since after the detach it reads as zeros anyway.
"""

from __future__ import annotations

from collections import deque

import trio

from qedfs.image.image import Image
from qedfs.overlay.ranges import Ranges
from qedfs.source.base import Extent

EXTENTS_BYTES = 1 << 30  # of the source asked about at once
MOST_EXTENTS = 1024  # kept of what it tells, 0.2 MiB: the rest is asked for again
STEPS_PER_TURN = 32  # of a walk over holes, up to 0.5 ms each, until other tasks get their turn


class MissingRuns:
    """The missing clusters of one image. Errors of the source and of the overlay."""

    def __init__(self, image: Image) -> None:
        self.skipped = 0  # bytes of the holes without a table
        self._image = image
        self._extents: deque[Extent] = deque()
        self._holes = Ranges()  # of L1 entries that have no table and for which the source has nothing
        self._steps = 0

    async def first_from(self, pos: int) -> int | None:
        """The first byte at or behind `pos` that needs the source; None: there is none."""
        cluster_size = self._image.overlay.cluster_size
        cluster = pos // cluster_size
        while not self._image.complete:
            found = await self._image.overlay.next_missing(cluster, 1)
            if found is None:
                break
            cluster = self._behind_holes(found[0])
            if cluster == found[0]:
                return max(pos, cluster * cluster_size)
            await self._give_way()
        return None

    async def next_run(self, cursor: int, source_size: int) -> tuple[int, int] | None:
        """The next run that has to cross the wire, at most one request long; holes on the way are dealt with."""
        image, fetch = self._image, self._image.fetch
        assert fetch is not None  # noqa: S101 - for the type checker; callers have looked
        overlay = image.overlay
        cluster_size = overlay.cluster_size
        while True:
            await self._give_way()
            most = max(1, fetch.background_request_bytes() // cluster_size)
            run = await overlay.next_missing(cursor, most)
            if run is None:
                return None
            first, count = run
            cursor = self._behind_holes(first)
            if cursor > first:
                continue
            extent = await self._extent(first * cluster_size, source_size)
            end = extent.pos + extent.size
            if not extent.zero:
                return first, max(1, min(count, -(-end // cluster_size) - first))
            whole = (end // cluster_size if end < image.size else overlay.geometry.clusters) - first
            if whole < 1:
                return first, 1  # the hole ends inside this cluster
            cursor = await self._pass_hole(first, whole)

    def _behind_holes(self, cluster: int) -> int:
        """This cluster, or the first one behind the holes that it lies in."""
        entries = self._image.overlay.geometry.entries
        end = self._holes.end_of(cluster // entries)
        return cluster if end is None else end * entries

    async def _pass_hole(self, first: int, count: int) -> int:
        """Deal with clusters that read as zeros in the source; returns the cluster to go on at."""
        overlay = self._image.overlay
        entries = overlay.geometry.entries
        index = first // entries
        stop = min((index + 1) * entries, overlay.geometry.clusters)
        if not overlay.has_table(first) and first % entries == 0 and first + count >= stop:
            reach = first + min(count, await overlay.gap(first))
            return self._skip(index, max(index + 1, reach // entries))
        count = min(count, stop - first)
        await overlay.adopt_zeros(first, count)
        return first + count

    def _skip(self, index: int, end: int) -> int:
        """Pass over tables that are not there, from one L1 index up to another; returns the cluster to go on at."""
        geometry = self._image.overlay.geometry
        end = self._holes.next_from(index, end)  # from there on another walk has
        self._holes.add(index, end)
        reach = min(end * geometry.entries, geometry.clusters)
        self.skipped += (reach - index * geometry.entries) * geometry.cluster_size
        return reach

    async def _give_way(self) -> None:
        """A step of a walk: however many there are, other tasks run in between."""
        self._steps += 1
        if self._steps % STEPS_PER_TURN == 0:
            await trio.lowlevel.checkpoint()

    async def _extent(self, pos: int, source_size: int) -> Extent:
        """What the source says of `pos`: a stretch that starts at or before it."""
        if pos >= source_size:
            return Extent(pos, self._image.size - pos + self._image.overlay.cluster_size, zero=True)
        while self._extents and self._extents[0].pos + self._extents[0].size <= pos:
            self._extents.popleft()
        if not self._extents or self._extents[0].pos > pos:
            assert self._image.fetch is not None  # noqa: S101 - for the type checker; callers have looked
            # To the end of the next L2 table at least: only then is a table that lies in a hole seen to do so.
            span = self._image.overlay.geometry.l2_span
            size = min(max(EXTENTS_BYTES, 2 * span - pos % span), source_size - pos)
            told = await self._image.fetch.extents(pos, size)
            self._extents = deque((told or [Extent(pos, size, zero=False)])[:MOST_EXTENTS])
        extent = self._extents[0]
        while extent.zero and len(self._extents) > 1 and self._extents[1].zero:
            following = self._extents[1]
            self._extents.popleft()
            extent = self._extents[0] = Extent(extent.pos, extent.size + following.size, zero=True)
        if extent.zero and extent.pos + extent.size >= source_size:
            return Extent(extent.pos, self._image.size - extent.pos + self._image.overlay.cluster_size, zero=True)
        return extent
