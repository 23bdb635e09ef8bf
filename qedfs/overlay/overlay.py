"""One QED overlay that is open: map, read, write, adopt, flush, detach. No network here.

Owns the rule whose bytes win; `pending.py` keeps the books for it. The caller knows what a missing cluster holds.
Places and writes are in `cluster_writer.py`, adoptions in `adoption.py`, header and record in `open_session.py`.

Concurrency protocol
--------------------
Everything runs on one event loop; the state changes only between two awaits.

- A cluster's entry goes from missing to zero or data, or from zero to data, and never back, with one exception: a
  barrier that fails takes back all entries that the disk may lack (`Committer.durably`), and `epoch` counts that. A
  reader whose runs are of an `epoch` that has passed reads again; a writer about to publish entries gets the error.
- A cluster is *claimed* from the moment its place is allocated until its entry is set, where the data is written by a
  worker thread in between. A write to a claimed cluster waits for the claim to end and looks again; an adoption
  leaves the cluster alone. So a guest's bytes always land on top of fetched ones, never below.
- While a write in part waits for the rest of its clusters, nobody adopts them: the write brings them in whole.
- Between the look at the entries and the allocation there must be no await; `PendingAllocations.settle` is the last
  one.
- A read takes its runs once. A write that has returned before the read began is in them; one that runs beside it may
  or may not be seen, as on any disk.
- The place of a write that failed is free again once its thread has ended (`allocator.py`): nobody else has ever known
  it.
- The tables are written by `commit.py` alone, under its lock.

A write is answered when its data is in the page cache and its entries are in the session journal, or, without a
journal, committed: either survives the death of the process.
"""

from __future__ import annotations

import os

from qedfs.errors import BadOverlay, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.record import Record
from qedfs.format.tables import MISSING
from qedfs.overlay.adoption import Adoption
from qedfs.overlay.allocator import Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.cluster_writer import ClusterWriter
from qedfs.overlay.clustermap import ClusterMap, Run
from qedfs.overlay.commit import Committer
from qedfs.overlay.dirty_pages import dirty_pages
from qedfs.overlay.fill import Fill, filled
from qedfs.overlay.open_session import Change, OpenSession
from qedfs.overlay.pending import PendingAllocations
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Buffer, Storage
from qedfs.overlay.table_slices import TableSlices

# Largest write done on the event loop: 1.4 us for 4 KiB into the page cache, some 20 us for 64 KiB; a hop costs 70 us.
WRITE_NOW_BYTES = 128 << 10
MAX_READ_BYTES = 1 << 20  # what one FUSE request asks for at most
# For reads on the spot, of all overlays: who gets a view of it hands it on before anybody can read again.
_SCRATCH = memoryview(bytearray(MAX_READ_BYTES))


class Overlay:
    """An open overlay. Positions are bytes of the image, offsets bytes of the overlay file."""

    def __init__(
        self,
        storage: Storage,
        session: OpenSession,
        tables: TableSlices,
        clusters: ClusterMap,
        committer: Committer,
        barriers: Barriers,
        journal: SessionJournal,
        allocator: Allocator,
        *,
        backing: str | None,
        journal_remark: str,
    ) -> None:
        """Take over what `open.py` has read.

        `journal_remark`: what was found of a killed session's writes that is not served.
        """
        self.storage = storage
        self.geometry = clusters.geometry
        self.clusters = clusters
        self.tables = tables
        self.committer = committer
        self.backing = backing
        self.journal_remark = journal_remark
        self.times = session.times  # of the image
        self._session = session
        self._barriers = barriers
        self._journal = journal
        self._pending = pending = PendingAllocations(clusters)
        self._writer = ClusterWriter(storage, clusters, committer, barriers, journal, allocator, pending)
        self._adoption = Adoption(tables, clusters, committer, barriers, session, allocator, pending, self._writer)

    # What it is.

    @property
    def image_size(self) -> int:
        """Bytes of the image."""
        return self.geometry.image_size

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return self.geometry.cluster_size

    @property
    def record(self) -> Record:
        """What qedfs remembers in this overlay, including what is being stored."""
        return self._session.record

    @property
    def probes_backing(self) -> bool:
        """Whether the format of the backing is left open (QEMU would look at its first bytes)."""
        return self.backing is not None and not self._session.names_format

    @property
    def epoch(self) -> int:
        """Another value than at the time of a `map` means that its runs may have been taken back (a failed barrier)."""
        return self.clusters.epoch

    @property
    def writable(self) -> bool:
        """Whether writes and adoptions are taken."""
        return self._barriers.writable

    @property
    def damage(self) -> BadOverlay | None:
        """What the overlay has lost: it was cut or overwritten, while it was open or before. It is never complete."""
        return self.storage.damage or self.clusters.damage

    @property
    def full(self) -> NoSpace | None:
        """What keeps this session from beginning: the disk was full at the open, and has been since."""
        return self._session.full

    @property
    def failure(self) -> ReadOnlyOverlay | None:
        """That a barrier has failed: the overlay takes nothing more until it is opened again."""
        return self._barriers.failure

    @property
    def missing(self) -> int | None:
        """How many clusters are missing; None until they have been counted, and after a failed barrier."""
        return self.clusters.missing

    @property
    def commit_pending(self) -> bool:
        """Whether there are entries that the file does not have yet."""
        return self.committer.pending

    @property
    def uncommitted_bytes(self) -> int:
        """Bytes of data whose commit is still to come."""
        return self.committer.uncommitted_bytes

    @property
    def crowded(self) -> bool:
        """Whether entries that wait for a commit take more memory than they should."""
        return self.tables.crowded

    @property
    def barriers(self) -> int:
        """How many barriers there have been since the overlay was opened."""
        return self._barriers.count

    @property
    def barrier_seconds(self) -> float:
        """Time spent in them."""
        return self._barriers.seconds

    @property
    def file_size(self) -> int:
        """Length of the overlay file."""
        return self.storage.size()

    @property
    def disk_usage(self) -> int:
        """Bytes that the overlay file takes on disk. Raises nothing: it is shown only."""
        return self.storage.disk_usage()

    def file_status(self) -> os.stat_result:
        """The attributes of the overlay file."""
        return self.storage.stat()

    @property
    def commit_error(self) -> QedfsError | None:
        """Why entries that wait for a commit are not in the file yet: the last one has failed."""
        return self.committer.error

    async def change_record(self, change: Change) -> None:
        """Make the overlay remember this too, durably. Calls take effect in order; an error undoes this change only.

        Where the disk has been full since the open, it becomes durable with the beginning of the session.
        """
        await self._session.change_record(change)

    # Read.

    def read_now(self, pos: int, size: int) -> memoryview | None:
        """The bytes, if they lie in one data cluster and in the page cache; None: go the long way.

        The view is of a buffer that the next call, for whatever overlay, overwrites: hand it on before the next await.
        (FUSE replies are written by the code that awaited us, with no await between.)
        """
        offset = self.clusters.data_offset(pos, size) if size <= MAX_READ_BYTES else 0
        if not offset:
            return None
        view = _SCRATCH[:size]
        return view if self.storage.read_now(offset, view) else None

    def read_data_now(self, offset: int, size: int) -> memoryview | None:
        """`size` bytes of a data run, if they are in the page cache. The view is of the buffer of `read_now`."""
        view = _SCRATCH[:size]
        return view if self.storage.read_now(offset, view) else None

    async def map(self, pos: int, size: int) -> list[Run]:
        """The runs of a request inside the image. Errors: BadOverlay for a bad entry."""
        while (runs := self.clusters.runs(pos, size)) is None:
            await self.clusters.load(pos, size)
        return runs

    def map_now(self, pos: int, size: int) -> list[Run] | None:
        """As `map`, if no table has to be read for it (`is_loaded`); else None."""
        return self.clusters.runs(pos, size)

    def is_loaded(self, pos: int, size: int) -> bool:
        """Whether the tables of a request are in memory."""
        return self.clusters.is_loaded(pos, size)

    async def load(self, pos: int, size: int) -> None:
        """Bring the tables of a request into memory. Errors as for `map`."""
        await self.clusters.load(pos, size)

    def follow_growth(self) -> None:
        """Take entries for good that lie inside the file as it is now: somebody else may have let it grow meanwhile.

        For an overlay that is looked at while a mount writes to it, after a `load` and before the look at the entries.
        """
        self.tables.follow_growth()

    async def read_data(self, offset: int, view: memoryview) -> None:
        """Fill `view` from a data run."""
        if not self.storage.read_now(offset, view):
            await self.storage.in_thread(lambda: self.storage.read(offset, view))

    # What is missing; see the methods of the same names in `clustermap.py`.

    async def count_missing(self) -> None:
        """Have `missing` tell. BadOverlay: a table cannot be read; all others have been looked at."""
        await self.clusters.count()

    async def next_missing(self, cluster: int, most: int) -> tuple[int, int] | None:
        """The first run of missing clusters at or after `cluster`: (first, count), at most `most` clusters long."""
        return await self.clusters.next_missing(cluster, most)

    async def gap(self, cluster: int) -> int:
        """How many clusters from here on are missing for want of a table, or of anything but a hole in it."""
        return await self.clusters.gap(cluster)

    def all_missing(self, cluster: int, count: int) -> bool:
        """Whether none of these clusters has an entry, as far as the tables in memory tell."""
        return self.clusters.all_missing(cluster, count)

    def has_table(self, cluster: int) -> bool:
        """Whether there is an L2 table for this cluster."""
        return self.clusters.has_table(cluster)

    # Write.

    def write_now(self, pos: int, data: Buffer) -> bool:
        """Write in place, if the request lies in one data cluster and will not have to wait; False: use `write`.

        Errors as for `write`.
        """
        if (
            len(data) > WRITE_NOW_BYTES
            or not self._barriers.writable
            or not self.times.may_move
            or dirty_pages.crowded()
        ):
            return False
        if not self._journal.takes_entries and (self.committer.pending or self.full):
            return False  # the cluster's entry may be among the pending ones, and has to be committed first
        offset = self.clusters.data_offset(pos, len(data))
        if not offset:
            return False
        try:
            self.storage.write(offset, (data,))
        finally:
            # After the write, whatever has come of it: who sees the new bytes, or what was there, sees a later time.
            self.times.move()
        return True

    async def write(self, pos: int, data: Buffer, fill: Fill) -> None:
        """Write inside the image.

        A new cluster that is written in part gets the rest from zeros where it was a zero cluster, from `fill` where it
        was missing, and zeros beyond the image's end.

        Raises:
            NoSpace: part of the data may have been written, to clusters that had a place already.
            ReadOnlyOverlay: the overlay takes no writes.
            QedfsError: whatever `fill` raised; nothing was written.
        """
        await self._session.ready()
        # Before the data: after a kill the image would otherwise show new bytes under its old time.
        await self._session.let_times_move()
        view = memoryview(data)
        rest: dict[int, Buffer] = {}
        with self._pending.merging(self._partial_clusters(pos, len(view))):
            # Every await in here ends with another look at the clusters: what was true before it may not be any more.
            while True:
                await self._pending.settle(pos, len(view))
                if await self.committer.secure_marks():
                    continue
                lacking = [c for c in self._partial_clusters(pos, len(view)) if c not in rest and self._is_missing(c)]
                if not lacking:
                    break
                rest |= await filled(lacking, fill)
            # A barrier may have failed while we waited: no slice may come up empty then.
            self._barriers.check_writable()
            writes, entries = self._writer.place(pos, view, rest)
            now = len(view) <= WRITE_NOW_BYTES and not dirty_pages.crowded()
            try:
                await self._writer.write(writes, entries, now=now)
            finally:
                self.times.move()
        if self.committer.pending and (not self._journal.takes_entries or self.tables.crowded):
            await self.committer.commit()
            if not self._journal.takes_entries:
                await self._session.note_no_journal()

    async def set_modified(self, modified_ns: int) -> None:
        """Give the image this mtime. Errors as for `write`."""
        await self._session.ready()
        await self._session.let_times_move()
        self.times.set(modified_ns)

    def _is_missing(self, cluster: int) -> bool:
        # Without a backing a missing cluster reads as zeros, like a zero cluster.
        return self.backing is not None and self.clusters.entry(cluster) == MISSING

    def _partial_clusters(self, pos: int, size: int) -> list[int]:
        """The clusters that the request covers in part, at most two; what ends with the image is whole."""
        cluster_size = self.cluster_size
        end = pos + size
        partial = []
        if pos % cluster_size:
            partial.append(pos // cluster_size)
        if end % cluster_size and end != self.image_size and end // cluster_size not in partial:
            partial.append(end // cluster_size)
        return partial

    # Adopt.

    async def adopt(self, pos: int, buffer: bytearray, size: int, *, cold: bool = False) -> int:
        """Keep the fetched bytes of all clusters that are still missing; returns how many bytes that were.

        Args:
            pos: start of a cluster.
            buffer: its first `size` bytes are the image's bytes at `pos`: whole clusters, the image's last one
                perhaps cut at its end. It must not change before the call has ended.
            cold: nobody has asked for these bytes; they need not stay in the page cache.

        Raises:
            NoSpace: nothing was kept of the clusters that hold data.
            ReadOnlyOverlay: the overlay takes no writes.
        """
        return await self._adoption.adopt(pos, buffer, size, cold=cold)

    def pending(self, cluster: int, count: int) -> list[int]:
        """Those of the clusters that somebody is about to give an entry: an adoption would leave them alone."""
        return self._pending.pending_in(range(cluster, cluster + count))

    async def adopt_zeros(self, cluster: int, count: int) -> None:
        """Make the clusters that are still missing zero clusters: the source has a hole there."""
        await self._adoption.adopt_zeros(cluster, count)

    # What others do to the file.

    async def inspect(self) -> None:
        """Look whether the file is still the one that was opened; raises BadOverlay if not. Some microseconds.

        To be called now and then, and before anything is said of the overlay as a whole.
        """
        await self._session.inspect()

    # Commit, flush, detach, close.

    async def commit(self) -> None:
        """Bring all entries into the file."""
        if self.full and self.committer.pending:
            await self._session.ready()
        await self.committer.commit()

    async def flush(self) -> None:
        """Make everything written before this call survive a power cut. Errors as for `Committer.commit`."""
        if not self.storage.writable:
            return
        if self.full and self.committer.pending:
            await self._session.ready()
        await self.committer.flush()

    async def detach(self) -> None:
        """Drop the backing: every byte of the image that is not zero is in the overlay.

        The flush comes first. Without its barrier the header could reach the disk before the last entries, and a
        power cut would leave an overlay without backing whose last clusters read as zeros.
        """
        await self._session.ready()
        await self.inspect()
        if self.damage is not None:
            raise self.damage.fresh()
        await self.committer.flush()
        await self._session.detach()
        self.backing = None

    async def close(self) -> None:
        """Flush if writable and give up the file. The journal goes if the overlay has all entries.

        Raises:
            NoSpace: what is pending has no room; the journal has it.
            ReadOnlyOverlay: a barrier has failed, now or at any time before, so that answered writes may be lost.
            BadOverlay: somebody has cut or overwritten the file.
        """
        in_order = False
        try:
            if self.writable:
                await self.flush()
                in_order = True
        finally:
            # A record, a detach or a group may be under way in a thread: the descriptor must not be closed under it.
            # The session first, in the order in which a change of the record takes the two locks.
            async with self._session.lock, self.committer.ended():
                await self._session.end(in_order=in_order)
                # After the note: a session that has not ended must not lack its journal.
                self._journal.close(remove=not self.committer.pending)
                self.storage.close()
                self.tables.close()
        if self.storage.writable and self.storage.damage is not None:
            raise self.storage.damage.fresh()
        self._barriers.check()

    def close_now(self) -> None:
        """Give up the file of an overlay that is open read-only: there is nothing to wait for."""
        self.storage.close()
        self.tables.close()
