"""Which clusters somebody is about to give an entry, and who has to wait for it or leave it alone.

Owns the claims and the merges of one overlay. The rules they serve are in the protocol at the top of `overlay.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import trio

from qedfs.overlay.clustermap import ClusterMap


class PendingAllocations:
    """Clusters in transition. All methods but `settle` are synchronous."""

    def __init__(self, clusters: ClusterMap) -> None:
        self._map = clusters
        self._cluster_size = clusters.geometry.cluster_size
        self._pending: dict[int, trio.Event] = {}
        self._merges: Counter[int] = Counter()

    def is_pending(self, cluster: int) -> bool:
        """Whether an adoption must leave this cluster alone."""
        return cluster in self._pending or self._merges[cluster] > 0

    def pending_in(self, clusters: range) -> list[int]:
        """Those of the clusters that an adoption must leave alone."""
        if not self._pending and not self._merges:
            return []
        return [cluster for cluster in clusters if self.is_pending(cluster)]

    @contextlib.contextmanager
    def allocating(self, clusters: Sequence[int]) -> Iterator[None]:
        """A worker thread writes these clusters' data; their slices stay in memory until the entries are set."""
        done = trio.Event()
        for cluster in clusters:
            self._pending[cluster] = done
            self._map.hold(cluster)
        try:
            yield
        finally:
            for cluster in clusters:
                del self._pending[cluster]
                self._map.release(cluster)
            done.set()

    @contextlib.contextmanager
    def merging(self, clusters: Sequence[int]) -> Iterator[None]:
        """A write in part is about to bring these clusters in whole, with less work than an adoption before it."""
        self._merges.update(clusters)
        try:
            yield
        finally:
            # One by one: with several such writes at any time there is no moment at which all have ended.
            for cluster in clusters:
                self._merges[cluster] -= 1
                if not self._merges[cluster]:
                    del self._merges[cluster]

    async def settle(self, pos: int, size: int) -> None:
        """Return, without a further await, when no cluster of the request is claimed and its slices are loaded."""
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
