"""Writes data to clusters: chooses the place of every byte, writes, then publishes the entries of new clusters.

Owns that order, and the rule that a failed write leaves no entry and no allocated space. Must not know whose bytes win
(`overlay.py`), nor where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.parts import Parts
from qedfs.overlay.pending import DataWrite
from qedfs.overlay.split import pieces
from qedfs.overlay.storage import Buffer

NewEntry = tuple[int, int]  # cluster, offset


class ClusterWriter:
    """The data writes of one overlay that may need new clusters."""

    def __init__(self, parts: Parts) -> None:
        self._storage = parts.storage
        self._map = parts.clusters
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._journal = parts.journal
        self._allocator = parts.allocator
        self._pending = parts.pending
        self._accesses = parts.freed.accesses
        self._cluster_size = parts.clusters.geometry.cluster_size

    def place(self, pos: int, view: memoryview, rest: Mapping[int, Buffer]) -> tuple[list[DataWrite], list[NewEntry]]:
        """Decide where every byte of a request goes. `rest`: the content of missing clusters that it covers in part.

        This allocates, so call `write` without an await in between. Otherwise another writer could allocate other
        places for the same clusters.

        Raises:
            BadOverlay: an entry is invalid. Nothing has been allocated.
        """
        self._map.runs(pos, len(view))
        cluster_size = self._cluster_size
        writes: list[DataWrite] = []
        entries: list[NewEntry] = []
        expected = 0  # offset at which the next piece would continue the last write
        for cluster, start, piece in pieces(pos, view, cluster_size):
            entry = self._map.entry(cluster)
            buffers: list[Buffer] = [piece]
            if entry > ZERO:
                offset = self._map.checked(entry, cluster) + start
            else:
                self._allocator.make_table(cluster)
                # If it has become a zero cluster while the rest was fetched, the rest is zeros instead.
                if entry == MISSING and cluster in rest:
                    start, buffers = 0, self._merged(cluster, start, piece, rest[cluster])
                whole = sum(map(len, buffers)) == cluster_size
                entry = self._allocator.clusters(1)[0] if whole else self._allocator.blank()
                entries.append((cluster, entry))
                offset = entry + start
            size = sum(map(len, buffers))
            if offset == expected:
                writes[-1][1].extend(buffers)
            else:
                writes.append((offset, buffers))
            expected = offset + size
        return writes, entries

    def _merged(self, cluster: int, start: int, piece: memoryview, rest: Buffer) -> list[Buffer]:
        """The cluster's fetched content with the guest's piece in it, up to the end of the image."""
        inside = min(self._cluster_size, self._map.geometry.image_size - cluster * self._cluster_size)
        view = memoryview(rest)
        return [view[:start], piece, view[start + len(piece) : inside]]

    async def write(self, writes: Sequence[DataWrite], entries: Sequence[NewEntry], *, now: bool) -> None:
        """Write the data and publish the entries.

        `now`: on the event loop. Otherwise in a thread, while the new clusters are claimed.

        Raises:
            NoSpace: data may have been written to clusters that were allocated before. No entry was published.
            ReadOnlyOverlay: a barrier has failed meanwhile. Likewise.
        """

        def write_all() -> None:
            for offset, buffers in writes:
                self._storage.write(offset, buffers)

        try:
            if now:
                write_all()
            else:
                with self._accesses.running(), self._pending.allocating([cluster for cluster, _ in entries], writes):
                    await self._storage.in_thread(write_all)
        except BaseException:
            # The thread has ended, even if we are cancelled, so nobody writes to these places any more.
            self._allocator.give_back(offset for _, offset in entries)
            raise
        # If a barrier has failed meanwhile, these bytes may be lost, so their entries must not be published.
        self._barriers.check_writable()
        # No await between the end of the claims and the entries. A writer that has waited for a claim reads the entry
        # next, and would consider the cluster missing.
        self._publish(entries)

    def _publish(self, entries: Sequence[NewEntry]) -> None:
        """Set entries whose data has been written, and add them to the journal, in case the process is killed."""
        if not entries:
            return
        self._map.set_all(entries)
        self._committer.note_data(len(entries) * self._cluster_size)
        self._journal.append(entries)
