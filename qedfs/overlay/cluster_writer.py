"""How data gets into clusters: a place for every byte, the write, then the entries of the clusters that are new.

Owns that order, and that a write that failed leaves no entry and no claimed space. Must not know whose bytes win
(`overlay.py`), nor where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.allocator import Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.commit import Committer
from qedfs.overlay.pending import PendingAllocations
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.split import pieces
from qedfs.overlay.storage import Buffer, Storage

DataWrite = tuple[int, list[Buffer]]  # offset in the file, and what comes there in one call
NewEntry = tuple[int, int]  # cluster, offset


class ClusterWriter:
    """The data writes of one overlay that may need new clusters."""

    def __init__(
        self,
        storage: Storage,
        clusters: ClusterMap,
        committer: Committer,
        barriers: Barriers,
        journal: SessionJournal,
        allocator: Allocator,
        pending: PendingAllocations,
    ) -> None:
        self._storage = storage
        self._map = clusters
        self._committer = committer
        self._barriers = barriers
        self._journal = journal
        self._allocator = allocator
        self._pending = pending
        self._cluster_size = clusters.geometry.cluster_size
        self._image_size = clusters.geometry.image_size

    def place(self, pos: int, view: memoryview, rest: Mapping[int, Buffer]) -> tuple[list[DataWrite], list[NewEntry]]:
        """Decide where every byte of a request goes; `rest`: the content of missing clusters that it covers in part.

        Allocates, so `write` has to follow without an await: another writer would give the same clusters other places.

        Raises:
            BadOverlay: an entry on the way cannot be; nothing has been allocated.
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
                # Not if it has become a zero cluster while the rest was fetched: then the rest is zeros.
                if entry == MISSING and cluster in rest:
                    start, buffers = 0, self._merged(cluster, start, piece, rest[cluster])
                whole = sum(map(len, buffers)) == cluster_size
                entry = self._allocator.clusters(1)[0] if whole else self._allocator.zeros(cluster_size)
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
        """The cluster's fetched content with the guest's piece in it; nothing of it lies beyond the image's end."""
        inside = min(self._cluster_size, self._image_size - cluster * self._cluster_size)
        view = memoryview(rest)
        return [view[:start], piece, view[start + len(piece) : inside]]

    async def write(self, writes: Sequence[DataWrite], entries: Sequence[NewEntry], *, now: bool) -> None:
        """Write the data and publish the entries. `now`: on the event loop; else new clusters are claimed meanwhile.

        Raises:
            NoSpace: some of it may have been written, to clusters that had a place already. No entry was published.
            ReadOnlyOverlay: a barrier has failed meanwhile; the same.
        """

        def write_all() -> None:
            for offset, buffers in writes:
                self._storage.write(offset, buffers)

        try:
            if now:
                write_all()
            else:
                with self._pending.allocating([cluster for cluster, _ in entries]):
                    await self._storage.in_thread(write_all)
        except BaseException:
            # The thread has ended, also if we are cancelled: nobody writes to these places any more.
            self._allocator.give_back(offset for _, offset in entries)
            raise
        # After a barrier that failed meanwhile nobody answers for these bytes, nor takes their entries.
        self._barriers.check_writable()
        # No await between the end of the claims and the entries: a writer that has waited for a claim looks at its
        # entry next, and would take the cluster for missing.
        self._publish(entries)

    def _publish(self, entries: Sequence[NewEntry]) -> None:
        """Set entries whose data is written, and let them survive the death of the process."""
        if not entries:
            return
        for cluster, entry in entries:
            self._map.set(cluster, entry)
        self._committer.note_data(len(entries) * self._cluster_size)
        self._journal.append(entries)
