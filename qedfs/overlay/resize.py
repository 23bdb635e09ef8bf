"""Gives the image of an overlay another size. QED has it in one field of the header: no table moves, and none is added.

Owns the order of writes, and what is refused. Must not know the backing, nor who has the image open.

Grow. What is new reads as zeros, so everything that the new size would show must be zero on the disk before the header
has it. Otherwise a power cut could leave sectors that nobody wrote and that differ from zeros (promise 4). That is:

1. the rest of the last cluster, if that ends past the old end. Other programs may leave bytes of a backing there;
2. entries past the old end in the last table, and in L1. Only another program, or a shrink that was interrupted, leaves
   any. They become zero entries, or no entry.

A barrier follows, then the header (64 bytes in one sector, which a power cut does not tear), then another barrier.
After that the memory has the new size, so that nothing is written past the old end while the file has the old size. A
missing cluster past the old end reads as the backing would, so the caller grows nothing over a larger backing.

Shrink. Only what is zero or missing goes. The smaller header is durable before the entries past the new end are
cleared: a zero cluster whose entry is cleared reads as the backing again, which must not be seen while the image still
has its old size. A power cut in between leaves entries past the end, which no reader sees; a grow clears them, and so
does another shrink to the same size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import UsageError
from qedfs.format.geometry import ENTRY_SIZE, MAX_FILE_SIZE, SECTOR_SIZE, Geometry
from qedfs.format.tables import ZERO
from qedfs.overlay.file_zeros import is_zero, write_zeros
from qedfs.overlay.parts import Parts


class Resizing:
    """The changes of size of one overlay, one at a time."""

    def __init__(self, parts: Parts, flush: Callable[[], Awaitable[None]]) -> None:
        """`flush`: that of the overlay."""
        self._storage = parts.storage
        self._tables = parts.tables
        self._map = parts.clusters
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._session = parts.session
        self._pending = parts.pending
        self._freed = parts.freed
        self._flush = flush
        self._lock = trio.Lock()

    async def grow(self, image_size: int) -> None:
        """See `Overlay.grow`."""
        async with self._lock:
            old = self._map.geometry
            new = sized(old, image_size)
            if image_size < old.image_size:
                raise UsageError(f"{image_size} bytes are less than the {old.image_size} that the image has")
            if image_size == old.image_size:
                return
            await self._session.ready()
            last = max(0, old.clusters - 1)
            # The count of missing clusters needs the slice of the last cluster at the moment of the change.
            self._map.hold(last)
            try:
                await self._clear_l1(old)
                await self._clear_entries(old, min(new.clusters, old.l1_used * old.entries))
                await self._zero_rest_of(last, old)
                await self._flush()  # 1 and 2 before the header
                with trio.CancelScope(shield=True):  # the header and the memory change together
                    await self._session.resize(image_size)
                    # No await from here on.
                    self._tables.grow(new)
                    self._map.grow(new)
            finally:
                self._map.release(last)

    async def shrink(self, image_size: int) -> None:
        """See `Overlay.shrink`."""
        async with self._lock:
            old = self._map.geometry
            new = sized(old, image_size)
            if image_size > old.image_size:
                raise UsageError(f"{image_size} bytes are more than the {old.image_size} that the image has")
            await self._session.ready()
            await self._check_goes(new, old)
            await self._flush()
            if image_size < old.image_size:
                await self._session.resize(image_size)
            # Only after the header is durable, see the head of the module.
            await self._clear_l1(new)
            await self._clear_file_entries(new)
            await self._committer.durably(self._barriers.barrier)

    # What is past the end.

    async def _clear_l1(self, geometry: Geometry) -> None:
        """Clear the L1 entries past the end of an image of this geometry, in the file. The memory has none of them."""
        place, size = self._tables.l1_place(geometry.l1_used), (geometry.entries - geometry.l1_used) * ENTRY_SIZE
        await self._storage.in_thread(lambda: write_zeros(self._storage, place, size))

    async def _clear_entries(self, old: Geometry, stop: int) -> None:
        """Let the entries from the old end to cluster `stop`, all of one table, refer to no data."""
        cluster, per_slice = old.clusters, self._map.slice_entries
        while cluster < stop and self._map.has_table(cluster):
            number = cluster // per_slice
            if (filled := await self._tables.hole_end(number)) > number:
                cluster = filled * per_slice
                continue
            count = min(stop, (number + 1) * per_slice) - cluster
            at = cluster % per_slice
            if max((await self._tables.entries(number))[at : at + count]) > ZERO:
                await self._map.load(cluster * old.cluster_size, 1)
                # What they refer to becomes a leak: nobody knows what else does.
                self._freed.references.before_discard(cluster, count)
                self._map.discard(cluster, count, missing_too=False)
            cluster += count

    async def _zero_rest_of(self, last: int, old: Geometry) -> None:
        """Zero what follows the image's end in its last cluster, if that has data. Otherwise, it reads as zeros."""
        inside = old.image_size % old.cluster_size
        await self._pending.settle(last * old.cluster_size, 1)  # a write that began earlier may be about to place it
        entry = self._map.entry(last) if inside else ZERO
        if entry > ZERO:
            place, size = self._map.checked(entry, last) + inside, old.cluster_size - inside
            # A move of this cluster waits for the end of the write, or it could copy what comes before it.
            with self._freed.accesses.running(), self._pending.allocating((), [(place, [bytes(size)])]):
                await self._storage.in_thread(lambda: write_zeros(self._storage, place, size))

    # Shrink.

    async def _check_goes(self, new: Geometry, old: Geometry) -> None:
        """Raise UsageError if any byte past the new end is data, and not zero."""
        cluster = new.image_size // new.cluster_size
        while cluster < old.clusters:
            cluster = await self._map.seek(cluster, old.clusters, hole=False, missing_is_hole=True)
            if cluster == old.clusters:
                break
            start = max(cluster * old.cluster_size, new.image_size)
            size = min((cluster + 1) * old.cluster_size, old.image_size) - start
            await self._map.load(start, size)
            offset = self._map.data_offset(start, size)
            if offset and not await self._storage.in_thread(functools.partial(is_zero, self._storage, offset, size)):
                raise UsageError(
                    f"has data past {new.image_size} bytes, in the cluster at {cluster * old.cluster_size}; only what"
                    " is zero or missing is cut off, so discard it first (blkdiscard, or fstrim in the guest)"
                )
            cluster += 1

    async def _clear_file_entries(self, new: Geometry) -> None:
        """Clear the entries of the last table that are past the new end, in the file only."""
        first = new.clusters % new.entries
        if first and (table := self._tables.l1[new.clusters // new.entries]):
            place, size = table + first * ENTRY_SIZE, (new.entries - first) * ENTRY_SIZE
            await self._storage.in_thread(lambda: write_zeros(self._storage, place, size))


def sized(geometry: Geometry, image_size: int) -> Geometry:
    """The geometry of an image of another size. Raises UsageError if QED does not allow that size."""
    if image_size % SECTOR_SIZE or image_size < 0:
        raise UsageError(f"a size of {image_size} bytes is not a multiple of {SECTOR_SIZE}")
    most = min(geometry.max_image_size, MAX_FILE_SIZE // SECTOR_SIZE * SECTOR_SIZE)
    if image_size > most:
        raise UsageError(f"{image_size} bytes are more than the tables of this overlay can map, which is {most}")
    return dataclasses.replace(geometry, image_size=image_size)
