"""Drops clusters whose bytes the backing has, too: they are missing again, and read the same.

Owns the comparison, and what a guest's write to a cluster that is being dropped means. Must not know why the backing
has these bytes (`image/commit_down.py`). The protocol is at the top of `overlay.py`.

While clusters are dropped, nobody changes the backing, and what it has is durable. So

1. a cluster is compared and dropped without an await in between. What a guest has written before makes a difference,
   and the cluster stays. What it writes afterwards is a new cluster, around which the backing has the right bytes;
2. a cluster stays, too, if a write to it is under way: in a thread, where it would go to the old place; or while it
   waits for the rest of the cluster, which it may have got before the backing had these bytes;
3. the journal gets the drop before the map does, as with a discard (`discard.py`). A later write of the session gives
   the cluster another place, which a recovery would otherwise take for that of another overlay;
4. the old place is free as that of a discarded cluster is (`freed.py`).

A drop that a kill or a power cut undoes costs nothing: the old entry refers to the same bytes.

An overlay whose clusters are dropped needs its backing. So while somebody is `allowed` to drop, it does not drop its
backing (`Overlay.detach`), nor the other way round. Whoever has found that nothing is missing must look again if
clusters were dropped since (`count`).

The comparison is made on the event loop, as the copy of a move is (`relocation.py`), a few clusters at a time: 40 us
for 128 KiB in the page cache. What is not there is read in a thread first. The event loop never waits for the backing:
it may be on a file server that hangs, or in a mount that this very loop serves.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import trio

from qedfs.errors import InUse, UsageError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Freed
from qedfs.overlay.journal import dropped_run
from qedfs.overlay.parts import Parts
from qedfs.overlay.storage import Storage

CROWDED_SECONDS = 0.05  # until the event loop is tried again, if it could have waited for the disk


class Below(Protocol):
    """The bytes of the backing, which do not change. It is not shorter than the clusters that are compared."""

    def read_now(self, pos: int, view: memoryview) -> bool:
        """Fill `view` from the page cache. False if it would have to wait for the disk."""
        ...

    def read_waiting(self, pos: int, view: memoryview) -> None:
        """Fill `view`, waiting for the disk."""
        ...

    def hole_end(self, pos: int) -> int:
        """Where the hole ends that `pos` is in; `pos` itself if it is in none. May wait for the disk."""
        ...


class Dropping:
    """The drops of one overlay."""

    def __init__(self, parts: Parts) -> None:
        self._storage = parts.storage
        self._map = parts.clusters
        self._barriers = parts.barriers
        self._journal = parts.journal
        self._session = parts.session
        self._pending = parts.pending
        self._freed = parts.freed
        self._loop_writes = parts.loop_writes
        self._cluster_size = parts.clusters.geometry.cluster_size
        self.count = 0  # of clusters that were dropped
        self.allowed = False
        self.detaching = False  # and also afterwards

    def allow(self) -> None:
        """Let clusters be dropped until `forbid`. Raises QedfsError if the backing is being dropped, or was."""
        if self.detaching:
            raise UsageError("is becoming complete, and needs no backing")
        self.allowed = True

    def forbid(self) -> None:
        """End `allow`."""
        self.allowed = False

    @contextlib.contextmanager
    def not_during_detach(self) -> Iterator[None]:
        """While the backing is dropped. If that succeeds, nothing can be dropped any more."""
        if self.allowed:
            raise InUse("is being committed into its backing, which it needs")
        self.detaching = True
        try:
            yield
        except BaseException:
            self.detaching = False
            raise

    @property
    def crowded(self) -> bool:
        """Whether more is dropped already, and not committed, than should be."""
        return self._freed.crowded

    async def drop(self, first: int, count: int, below: Below) -> int | None:
        """Drop those of these clusters that have the same bytes as the backing. Returns how many.

        None: not now, as the event loop could have to wait for the disk. Raises BadOverlay, ReadOnlyOverlay, and the
        errors of both files.
        """
        assert self.allowed  # noqa: S101 - the caller has asked for it
        await self._session.ready()
        found: dict[int, memoryview] | None = None
        while True:
            await self._settled(first, count)
            if not self._loop_writes.may_begin(0):
                await trio.sleep(CROWDED_SECONDS)
                return None
            # No await since `_settled`, nor before the end of `_publish`.
            try:
                same = self._same(first, count, below, found)
            finally:
                self._loop_writes.ended()
            if same is None:
                found = await self._read_below(first, count, below)
            elif not same:
                return 0
            elif self._publish(same):
                return len(same)

    async def _settled(self, first: int, count: int) -> None:
        """Wait until the slices are loaded, nothing is held, and the journal agrees with what it lacks."""
        pos, size = first * self._cluster_size, count * self._cluster_size
        while True:
            if self._pending.hold is not None:
                await self._pending.hold.wait()  # the file is being copied
            elif self._journal.outlived:
                await self._session.give_up_journal()
            elif self._map.is_loaded(pos, size):
                self._barriers.check_writable()
                return
            else:
                await self._map.load(pos, size)

    def _same(self, first: int, count: int, below: Below, found: dict[int, memoryview] | None) -> list[int] | None:
        """Those that may be dropped; None if that cannot be told without waiting for a disk.

        `found`: what the backing has, as `_read_below` returns it; None if that was not called.
        """
        size = self._cluster_size
        views = memoryview(bytearray(size)), memoryview(bytearray(size))
        same: list[int] = []
        for cluster in range(first, first + count):
            entry = self._map.entry(cluster)
            if entry == MISSING or self._pending.is_pending(cluster):
                continue
            pos = cluster * size
            inside = min(size, self._map.geometry.image_size - pos)
            own, other = views[0][:inside], views[1][:inside]
            if entry == ZERO:
                own[:] = bytes(inside)
            else:
                place = self._map.checked(entry, cluster)
                if self._pending.write_into(place, size) is not None:
                    continue
                if not self._read(self._storage, place, own, wait=found is not None):
                    return None
            if found is not None:
                other = found.get(cluster, other[:0])  # it was missing then, and a guest has written to it
            elif entry == ZERO or not below.read_now(pos, other):
                return None
            if own == other:
                same.append(cluster)
        return same

    @staticmethod
    def _read(storage: Storage, place: int, view: memoryview, *, wait: bool) -> bool:
        if not storage.read_now(place, view):
            if not wait:  # if a thread has just read it, and it is still not to be had, the file system never says so
                return False
            storage.read(place, view)
        return True

    async def _read_below(self, first: int, count: int, below: Below) -> dict[int, memoryview]:
        """What the backing has of those that are not missing. Brings those of the overlay into the page cache."""
        size, image_size = self._cluster_size, self._map.geometry.image_size
        entries = [(cluster, self._map.entry(cluster)) for cluster in range(first, first + count)]
        places = [
            (c, entry if entry == ZERO else self._map.checked(entry, c)) for c, entry in entries if entry != MISSING
        ]

        def read_all() -> dict[int, memoryview]:
            own, hole = memoryview(bytearray(size)), 0  # up to there, the backing is a hole
            found: dict[int, memoryview] = {}
            for cluster, place in places:
                pos = cluster * size
                view = found[cluster] = memoryview(bytearray(min(size, image_size - pos)))
                if place > ZERO:
                    self._storage.read(place, own)
                elif hole < pos + len(view):
                    hole = below.hole_end(pos)
                if place > ZERO or hole < pos + len(view):
                    below.read_waiting(pos, view)
            return found

        with self._freed.accesses.running():
            return await self._storage.in_thread(read_all)

    def _publish(self, same: Sequence[int]) -> bool:
        """Let these clusters be missing. Returns False if the journal does not take that: nothing has changed then."""
        self._freed.references.before_discard(same[0], same[-1] + 1 - same[0])
        self._journal.append([(cluster, dropped_run(count)) for cluster, count in _runs(same)])
        if self._journal.outlived:
            return False
        freed: Freed = {}
        self._map.drop(same, freed)
        self.count += len(same)
        self._freed.add(freed)
        return True


def _runs(clusters: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among these clusters, as (first, how many)."""
    for _, group in itertools.groupby(enumerate(clusters), lambda pair: pair[1] - pair[0]):
        run = [cluster for _, cluster in group]
        yield run[0], len(run)
