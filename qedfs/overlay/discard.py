"""Discards: turn whole clusters into zero clusters, whatever they were, so that what was missing is never fetched.

Owns the order of a discard: space, journal, map. Must not know what asks for it, nor parts of clusters. The protocol is
at the top of `overlay.py`.

The journal gets the discard before the map does. A session that is killed thus restores it in its order among writes.
If the journal takes nothing more, all of its entries are committed first, and it becomes void: it could otherwise bring
back what was written before the discard. What the journal gets begins with a cluster that the discard changes: the
recovery expects the file to have this change, if it is the last one of a commit (`recovery.py`: the witness).

The entries of missing clusters need space in the file. It is reserved before they change. Otherwise, on a full disk,
the guest's next flush would fail, and with it all that the guest has written, for the sake of a discard. What has data
needs no space, and gives some back. So it comes first on a full disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import trio

from qedfs.errors import NoSpace
from qedfs.overlay.journal import zero_run
from qedfs.overlay.parts import Parts

CLUSTERS_AT_ONCE = 4096  # 0.1 ms on the event loop if all are missing, up to 1 ms otherwise

Clusters = tuple[int, int]  # the first, and how many


class Discards:
    """The discards of one overlay."""

    def __init__(self, parts: Parts) -> None:
        self._storage = parts.storage
        self._tables = parts.tables
        self._map = parts.clusters
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._journal = parts.journal
        self._session = parts.session
        self._allocator = parts.allocator
        self._pending = parts.pending
        self._freed = parts.freed
        self._room = parts.room
        self._cluster_size = parts.clusters.geometry.cluster_size

    async def discard(self, cluster: int, count: int, *, missing_too: bool) -> int:
        """See `Overlay.discard`. `missing_too`: missing clusters may read as something else than zeros."""
        await self._session.ready()
        await self._session.let_times_move()
        missing, left = await self._discard_all([(cluster, count)], missing_too=missing_too)
        if left:
            with contextlib.suppress(NoSpace):
                await self._room.make()
            more, left = await self._discard_all(left, missing_too=missing_too)
            missing += more
        if self._committer.pending and not self._journal.takes_entries:
            await self._room.with_room(self._committer.commit)
            await self._session.note_no_journal()
        self._barriers.check_writable()  # a barrier that has failed meanwhile may have taken entries back
        if left:
            raise NoSpace("the file system is full: there is no space for the entries of clusters that were missing")
        return missing

    async def _discard_all(self, ranges: Iterable[Clusters], *, missing_too: bool) -> tuple[int, list[Clusters]]:
        """Returns how many clusters were missing, and where there was no space for entries. There, data is discarded.

        Raises NoSpace if too much is uncommitted, and there is no space to commit it.
        """
        missing = 0
        left: list[Clusters] = []
        for first, count in ((at, n) for start, size in ranges for at, n in _pieces(start, size)):
            try:
                missing += await self._discard_some(first, count, missing_too=missing_too)
            except NoSpace:
                await self._discard_some(first, count, missing_too=False)
                left.append((first, count))
            if self._tables.crowded or self._freed.crowded:
                await self._room.with_room(self._committer.commit)
                await self._freed.give_back()
            await trio.lowlevel.checkpoint()
        return missing, left

    async def _discard_some(self, first: int, count: int, *, missing_too: bool) -> int:
        pos = first * self._cluster_size
        size = count * self._cluster_size  # the last cluster may end past the image
        thawed = not missing_too
        while True:
            # Whoever has claimed a cluster is about to give it an entry, which the discard replaces.
            await self._pending.settle(pos, size)
            if await self._committer.secure_marks():
                continue
            if not thawed and self._storage.would_wait():
                # Not on the event loop, in `_make_tables`. Once, as in `Committer.commit`.
                await self._storage.in_thread(self._storage.wait_to_write)
                thawed = True
                continue
            self._barriers.check_writable()
            stop = first + count
            first = self._map.first_discardable(first, count, missing_too=missing_too)
            if first == stop:
                return 0
            count = stop - first
            # No await from here on, unless the loop continues.
            if missing_too:
                self._make_tables(first, count)
            self._freed.references.before_discard(first, count)
            if self._journal.takes_entries:
                self._journal.append([(first, zero_run(count))])
            if not self._journal.outlived:
                break
            await self._session.give_up_journal()
        # No await between the look-up and the change.
        freed, missing = self._map.discard(first, count, missing_too=missing_too)
        self._freed.add(freed)
        self._session.times.move()
        return missing

    def _make_tables(self, first: int, count: int) -> None:
        """Make sure that there are tables for these clusters, with space in the file if entries are missing.

        Raises NoSpace: at most some tables without entries are new.
        """
        stop = first + count
        while first < stop:
            end = min(stop, (first // self._map.slice_entries + 1) * self._map.slice_entries)
            self._allocator.make_table(first, reserve=self._map.count_missing_in(first, end - first) and end - first)
            first = end


def _pieces(first: int, count: int) -> Iterator[Clusters]:
    for at in range(first, first + count, CLUSTERS_AT_ONCE):
        yield at, min(CLUSTERS_AT_ONCE, first + count - at)
