"""Adoption: stores fetched clusters in the overlay, provided that they are still missing.

Owns the choice of clusters to store, and how many adoptions run at once. Must not know where the bytes come from, nor
how they are written (`cluster_writer.py`). The protocol is at the top of `overlay.py`.
"""

from __future__ import annotations

import trio

from qedfs.format.tables import ZERO
from qedfs.overlay.cluster_writer import ClusterWriter
from qedfs.overlay.parts import Parts
from qedfs.overlay.split import laid_out, zero_bytes

ZEROS_AT_ONCE = 8192  # clusters: 40 us on the event loop if all are missing, up to 1 ms otherwise
# How many adoptions run at once: fewer than the storage has threads, so that readers and guests always find one.
ADOPTIONS = 4


class Adoption:
    """The adoptions of one overlay."""

    def __init__(self, parts: Parts, writer: ClusterWriter) -> None:
        self._tables = parts.tables
        self._map = parts.clusters
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._session = parts.session
        self._allocator = parts.allocator
        self._pending = parts.pending
        self._writer = writer
        self._cluster_size = parts.clusters.geometry.cluster_size
        self._turns = trio.Semaphore(ADOPTIONS)

    async def adopt(self, pos: int, buffer: bytearray, size: int, *, cold: bool) -> int:
        """See `Overlay.adopt`."""
        clusters = range(pos // self._cluster_size, -(-(pos + size) // self._cluster_size))
        if len(self._pending.pending_in(clusters)) == len(clusters):
            return 0  # most likely fetched for a partial write, which stores the cluster itself
        async with self._turns:
            return await self._adopt(pos, buffer, size, cold=cold)

    async def _adopt(self, pos: int, buffer: bytearray, size: int, *, cold: bool) -> int:
        await self._session.ready()
        await self._load_to_allocate(pos, size)
        # No await from here until `write` has claimed the clusters: they must still be missing when they are allocated.
        data, kept = self._sort_out(pos, buffer, size)
        if not data:
            return kept
        places = self._allocator.clusters(len(data))
        writes = list(laid_out(places, buffer, size, [at for _, at in data], self._cluster_size))
        await self._writer.write(writes, [(cluster, places[i]) for i, (cluster, _) in enumerate(data)], now=False)
        if cold:
            for offset, buffers in writes:
                self._committer.note_cold(offset, sum(map(len, buffers)))
        return kept + len(data) * self._cluster_size

    async def _load_to_allocate(self, pos: int, size: int) -> None:
        """Wait until the slices are loaded and the file may grow. Does not await after the last check."""
        while True:
            if self._pending.hold is not None:
                await self._pending.hold.wait()
            elif not self._map.is_loaded(pos, size):
                await self._map.load(pos, size)
            elif not await self._committer.secure_marks():
                break
        self._barriers.check_writable()

    def _sort_out(self, pos: int, buffer: bytearray, size: int) -> tuple[list[tuple[int, int]], int]:
        """Select the clusters to adopt. Zero clusters get their entries at once.

        Returns the others as (cluster, start in buffer), and how many bytes the zero clusters have.
        """
        cluster_size = self._cluster_size
        first, count = pos // cluster_size, -(-size // cluster_size)
        claimed = set(self._pending.pending_in(range(first, first + count)))
        free = [cluster for cluster in self._map.missing_of(first, count) if cluster not in claimed]
        for cluster in self._map.one_of_each_slice(free):
            self._allocator.make_table(cluster)
        zeros, whole = zero_bytes(cluster_size), first + size // cluster_size
        data: list[tuple[int, int]] = []
        holes: list[tuple[int, int]] = []
        for cluster in free:
            at = (cluster - first) * cluster_size
            # startswith compares in place, takes 15 us for 1 MiB of zeros, and stops at the first other byte.
            if buffer.startswith(zeros if cluster < whole else zeros[: size - at], at):
                holes.append((cluster, ZERO))
            else:
                data.append((cluster, at))
        # Not in the journal: if the entry is lost in a kill, the cluster is missing again and reads the same.
        self._map.set_all(holes)
        return data, len(holes) * cluster_size

    async def adopt_zeros(self, cluster: int, count: int) -> None:
        """See `Overlay.adopt_zeros`."""
        await self._session.ready()
        for first in range(cluster, cluster + count, ZEROS_AT_ONCE):
            await self._adopt_some_zeros(first, min(ZEROS_AT_ONCE, cluster + count - first))
            if self._tables.crowded:
                await self._committer.commit()
            await trio.lowlevel.checkpoint()

    async def _adopt_some_zeros(self, cluster: int, count: int) -> None:
        pos = cluster * self._cluster_size
        size = count * self._cluster_size  # the last cluster may end past the image
        await self._load_to_allocate(pos, size)
        pending = self._pending.pending_in(range(cluster, cluster + count))
        for number in range(cluster, cluster + count, self._map.slice_entries):
            self._allocator.make_table(number)
        self._allocator.make_table(cluster + count - 1)
        for taken in (*pending, cluster + count):
            self._map.set_zeros(cluster, taken - cluster)
            cluster = taken + 1
