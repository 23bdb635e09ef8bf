"""The pending allocations of an overlay: clusters that a running write is about to give an entry.

Owns the set of these clusters and of those being merged, on which other writes wait and which adoptions skip. The
protocol is at the top of `overlay.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import trio

from qedfs.overlay.clustermap import ClusterMap


class PendingAllocations:
    """The clusters in transition. All methods except `settle` are synchronous."""

    def __init__(self, clusters: ClusterMap) -> None:
        self._map = clusters
        self._cluster_size = clusters.geometry.cluster_size
        self._pending: dict[int, trio.Event] = {}
        self._merges: Counter[int] = Counter()

    def is_pending(self, cluster: int) -> bool:
        """Whether an adoption must skip this cluster."""
        return cluster in self._pending or self._merges[cluster] > 0

    def pending_in(self, clusters: range) -> list[int]:
        """Those of the clusters that an adoption must skip."""
        if not self._pending and not self._merges:
            return []
        return [cluster for cluster in clusters if self.is_pending(cluster)]

    @contextlib.contextmanager
    def allocating(self, clusters: Sequence[int]) -> Iterator[None]:
        """Claim these clusters while a worker thread writes their data. Their slices stay in memory meanwhile."""
        # No cluster has an older claim, whose event this would hide: adoptions skip those, and writes have come here
        # from `settle` without an await.
        done = trio.Event()
        for cluster in clusters:
            self._pending[cluster] = done
            self._map.hold(cluster)  # an entry can only be set in a slice that is in memory
        try:
            yield
        finally:
            # The caller sets the entries next. Until its next await no slice is evicted, and no waiting task runs.
            for cluster in clusters:
                del self._pending[cluster]
                self._map.release(cluster)
            done.set()

    @contextlib.contextmanager
    def merging(self, clusters: Sequence[int]) -> Iterator[None]:
        """Make adoptions skip these clusters, because a partial write will store them whole in any case."""
        self._merges.update(clusters)
        try:
            yield
        finally:
            # Delete counts individually. With overlapping writes there may never be a moment when all have ended.
            for cluster in clusters:
                self._merges[cluster] -= 1
                if not self._merges[cluster]:
                    del self._merges[cluster]

    async def settle(self, pos: int, size: int) -> None:
        """Wait until no cluster of the request is claimed and its slices are loaded. No await follows that check."""
        # Start again after each await: another write may have claimed clusters that were free, and a load for another
        # request may have evicted our slices.
        while True:
            claim = self._claim_in(pos, size)
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
