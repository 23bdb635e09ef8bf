"""Finds the missing clusters of an image that have to be fetched, and skips the holes of the source.

Owns the extents that the source has told, as far as this walk needs them. Notes in `Image.source_holes`, for all walks,
which absent L2 tables lie in a hole. Must not know when a request may be sent.

Where the source has a hole, missing clusters get zero entries, and nothing is fetched. A range without an L2 table over
a hole is skipped: after the detach it reads as zeros anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import trio

from qedfs.errors import SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.source.base import Extent

EXTENTS_BYTES = 1 << 30  # size of the range in one query for extents
MOST_EXTENTS = 1024  # how many of them are kept, 0.2 MiB. The rest is queried again.
MOST_RUN_CLUSTERS = 1 << 16
STEPS_PER_TURN = 32  # steps of a walk over holes, up to 0.5 ms each, before other tasks get their turn


def fetch_of(image: Image) -> FetchQueue:
    """The queue of an image. Raises SourceUnreachable if it has none: at any await it may go back to standby."""
    if image.fetch is None:
        raise SourceUnreachable(f"{image.name}: its source was taken away")
    return image.fetch


class MissingRuns:
    """The missing clusters of one image. The methods raise the errors of the source and of the overlay."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._exchanges = image.exchanges  # the source of which all that follows is known
        self._size = image.size  # likewise, of the image
        self._skipped = 0
        self._extents: deque[Extent] = deque()
        self._steps = 0

    @property
    def skipped(self) -> int:
        """Bytes of skipped ranges without a table."""
        self._forget_old_source()
        return self._skipped

    def _forget_old_source(self) -> None:
        """Forget what is known of a source that the image does not have any more, or of an image that has grown."""
        if (self._exchanges, self._size) != (self._image.exchanges, self._image.size):
            self._exchanges, self._size = self._image.exchanges, self._image.size
            self._skipped = 0
            self._extents.clear()

    async def first_from(self, pos: int) -> int | None:
        """The first byte at or after `pos` that needs the source; None if there is none."""
        cluster_size = self._image.overlay.cluster_size
        cluster = pos // cluster_size
        while not self._image.complete:
            found = await self._image.overlay.next_missing(cluster, 1)
            if found is None:
                break
            cluster = self._skip_known_holes(found[0])
            if cluster == found[0]:
                return max(pos, cluster * cluster_size)
            await self._yield_sometimes()
        return None

    async def next_run(self, cursor: int, source_size: int) -> tuple[int, int] | None:
        """The next run that has to be fetched, at most one request long. Handles the holes before it."""
        image, overlay = self._image, self._image.overlay
        cluster_size = overlay.cluster_size
        while True:
            await self._yield_sometimes()
            most = max(1, self.request_bytes() // cluster_size)
            run = await overlay.next_missing(cursor, most)
            if run is None:
                return None
            first, count = run
            cursor = self._skip_known_holes(first)
            if cursor > first:
                continue
            extent = await self._extent(first * cluster_size, source_size)
            end = extent.pos + extent.size
            if not extent.zero:
                return first, max(1, min(count, -(-end // cluster_size) - first))
            whole = (end // cluster_size if end < image.size else overlay.geometry.clusters) - first
            if whole < 1:
                return first, 1  # the hole ends inside this cluster
            cursor = await self._handle_hole(first, whole)

    def request_bytes(self) -> int:
        """How long the next run may be."""
        return fetch_of(self._image).background_request_bytes()

    async def told(self, pos: int, size: int) -> Sequence[Extent] | None:
        """The extents that the source tells of this range."""
        return await fetch_of(self._image).extents(pos, size)

    async def ranges_from(self, pos: int, most: int) -> tuple[list[tuple[int, int]], int | None]:
        """Up to `most` ranges, as (pos, size), that need the source, and where to go on; None at the end."""
        cluster_size, found = self._image.overlay.cluster_size, list[tuple[int, int]]()
        while (start := await self.first_from(pos)) is not None:
            if len(found) == most:
                return found, start
            first = start // cluster_size
            run = await self._image.overlay.next_missing(first, MOST_RUN_CLUSTERS)
            count = 1 if run is None or run[0] != first else run[1]
            end = min(self._image.size, (first + count) * cluster_size)
            # Up to the next known hole at most.
            table = -(-(first + 1) // self._image.overlay.geometry.entries)
            hole = self._image.source_holes.next_from(table, -(-end // self._image.overlay.geometry.l2_span))
            end = min(end, hole * self._image.overlay.geometry.l2_span)
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + end - start)
            else:
                found.append((start, end - start))
            pos = end
        return found, None

    def _skip_known_holes(self, cluster: int) -> int:
        """This cluster, or the first one after the known hole that it lies in."""
        entries = self._image.overlay.geometry.entries
        end = self._image.source_holes.end_of(cluster // entries)
        return cluster if end is None else end * entries

    async def _handle_hole(self, first: int, count: int) -> int:
        """Skip missing clusters that are zeros in the source, or give them zero entries. Returns where to continue."""
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
        """Skip absent tables from one L1 index up to another. Returns the cluster where to continue."""
        geometry, holes = self._image.overlay.geometry, self._image.source_holes
        self._forget_old_source()
        end = holes.next_from(index, end)  # another walk has skipped those after it
        holes.add(index, end)
        reach = min(end * geometry.entries, geometry.clusters)
        self._skipped += (reach - index * geometry.entries) * geometry.cluster_size
        return reach

    async def _yield_sometimes(self) -> None:
        """Count a step of a walk, and let other tasks run after every STEPS_PER_TURN steps."""
        self._steps += 1
        if self._steps % STEPS_PER_TURN == 0:
            await trio.lowlevel.checkpoint()

    async def _extent(self, pos: int, source_size: int) -> Extent:
        """The extent of the source that `pos` is in. It starts at or before `pos`."""
        self._forget_old_source()
        if pos >= source_size:
            return Extent(pos, self._image.size - pos + self._image.overlay.cluster_size, zero=True)
        while self._extents and self._extents[0].pos + self._extents[0].size <= pos:
            self._extents.popleft()
        if not self._extents or self._extents[0].pos > pos:
            # At least to the end of the next L2 table's range, to detect a table that lies entirely in a hole.
            span = self._image.overlay.geometry.l2_span
            size = min(max(EXTENTS_BYTES, 2 * span - pos % span), source_size - pos)
            told = await self.told(pos, size)
            if self._exchanges != self._image.exchanges:
                raise SourceUnreachable(f"{self._image.name}: has another source now")
            self._extents = deque((told or [Extent(pos, size, zero=False)])[:MOST_EXTENTS])
        extent = self._extents[0]
        while extent.zero and len(self._extents) > 1 and self._extents[1].zero:
            following = self._extents[1]
            self._extents.popleft()
            extent = self._extents[0] = Extent(extent.pos, extent.size + following.size, zero=True)
        if extent.zero and extent.pos + extent.size >= source_size:
            return Extent(extent.pos, self._image.size - extent.pos + self._image.overlay.cluster_size, zero=True)
        return extent
