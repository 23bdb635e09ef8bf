"""The pending allocations of an overlay: clusters that a running write or adoption is about to give an entry.

Owns two sets: the claimed clusters, which other writes wait for, and the clusters that a partial write is about to
merge. Adoptions skip both. Also owns where in the file worker threads are writing. Must not know what is written. The
protocol is at the top of `overlay.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import trio

from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.storage import Buffer

DataWrite = tuple[int, list[Buffer]]  # offset in the file, and the data of one call


class PendingAllocations:
    """The clusters in transition. All methods except `settle` are synchronous."""

    def __init__(self, clusters: ClusterMap) -> None:
        self._map = clusters
        self._cluster_size = clusters.geometry.cluster_size
        self._pending: dict[int, trio.Event] = {}
        self._merges: Counter[int] = Counter()
        self.hold: trio.Event | None = None  # while nothing may be stored, see `stillness.py`; set at the end of that
        self._writes: dict[trio.Event, Sequence[DataWrite]] = {}  # those under way, by the event that ends them

    def is_pending(self, cluster: int) -> bool:
        """Whether an adoption must skip this cluster."""
        return cluster in self._pending or cluster in self._merges

    def pending_in(self, clusters: range) -> list[int]:
        """The clusters in this range that an adoption must skip."""
        pending, merges = self._pending, self._merges
        if not pending and not merges:
            return []
        return [cluster for cluster in clusters if cluster in pending or cluster in merges]

    @contextlib.contextmanager
    def allocating(self, clusters: Sequence[int], writes: Sequence[DataWrite]) -> Iterator[None]:
        """Claim these clusters while a worker thread makes these writes. Their slices stay in memory meanwhile."""
        # None of these clusters is claimed already, or its event would be replaced here: adoptions skip claimed
        # clusters, and writes come here from `settle` without an await.
        done = trio.Event()
        self._writes[done] = writes
        self._pending.update(dict.fromkeys(clusters, done))
        held = self._map.one_of_each_slice(clusters)
        for cluster in held:
            self._map.hold(cluster)  # an entry can only be set in a slice that is in memory
        try:
            yield
        finally:
            # The caller sets the entries next. Until the caller's next await, no slice is evicted and no waiting task
            # runs.
            del self._writes[done]
            for cluster in clusters:
                del self._pending[cluster]
            for cluster in held:
                self._map.release(cluster)
            done.set()

    def write_into(self, offset: int, size: int) -> trio.Event | None:
        """The end of a thread's write into this part of the file; None if none is under way."""
        for done, writes in self._writes.items():
            for start, buffers in writes:
                if start < offset + size and offset < start + sum(map(len, buffers)):
                    return done
        return None

    @contextlib.contextmanager
    def merging(self, clusters: Sequence[int]) -> Iterator[None]:
        """Make adoptions skip these clusters, because a partial write is about to store them whole itself."""
        self._merges.update(clusters)
        try:
            yield
        finally:
            # Delete each count when it reaches zero. If writes keep overlapping, there may never be a moment when all
            # of them have ended and the whole Counter could be cleared.
            for cluster in clusters:
                self._merges[cluster] -= 1
                if not self._merges[cluster]:
                    del self._merges[cluster]

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let `settle` wait until the end of the block, and adoptions as well."""
        self.hold = end = trio.Event()
        try:
            yield
        finally:
            self.hold = None
            end.set()

    async def settle(self, pos: int, size: int) -> None:
        """Wait until none of the request's clusters is claimed, its slices are loaded, and nothing is held.

        When this returns, no await has followed the check of both.
        """
        # Start again after each await: another write may have claimed clusters that were free, and a load for another
        # request may have evicted our slices.
        while True:
            claim = self._claim_in(pos, size) if self.hold is None else self.hold
            if claim is not None:
                await claim.wait()
            elif self._map.is_loaded(pos, size):
                return
            else:
                await self._map.load(pos, size)

    def _claim_in(self, pos: int, size: int) -> trio.Event | None:
        if not self._pending:
            return None
        clusters = range(pos // self._cluster_size, -(-(pos + size) // self._cluster_size))
        return next((self._pending[cluster] for cluster in clusters if cluster in self._pending), None)
