"""The one writer of tables: brings entries from memory into the file, in groups, in an order that survives a power cut.

Owns the group commit and the flush. Must not know where the bytes come from, nor how places are found (`allocator.py`).

One group:

1. The file is made as long as what is allocated, whole clusters. A new table is a hole there, which reads as zeros.
2. **Barrier**. Without it an entry could reach the disk before its data, and a power cut would leave a cluster that
   reads as garbage where the backing had good bytes; or an L1 entry before the zeros of its table.
3. Changed sectors of the tables are written, L2 and L1, in any order: each entry stands for itself. An L2 entry without
   its L1 entry is not seen, and an L1 entry without its L2 entries leads to "missing".

A flush is a group and a **barrier** after it. A power cut at any point leaves at worst clusters that nothing refers
to. Entries of one group are snapshots taken at its start: an entry published later has its data written after the
barrier of step 2 began, and belongs to the next group.

A barrier that fails ends the session's writes, and the map goes back to what the disk has (`_read_again`). Barriers run
one at a time, whoever asks for them: Linux reports a lost page to one of two that run side by side, and tells the other
that all is well.

Groups run one after the other under a lock; a caller that finds a group started after its call already done has
nothing left to do, so any number of waiting writers share one barrier.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import trio

from qedfs.errors import QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import ENTRY_SIZE, round_down
from qedfs.format.header import Header
from qedfs.format.tables import decode_table, encode_table
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.sectors import SECTOR_ENTRIES, Write, joined
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices
from qedfs.overlay.truncation_marks import TruncationMarks


@dataclasses.dataclass(slots=True)
class _Group:
    """What one commit brings into the file."""

    sectors: list[Write]  # of L2 tables and of L1
    dirty: dict[int, set[int]]
    tables: set[int]
    cold: list[tuple[int, int]]  # (offset, size) of data that nobody is expected to read soon
    journal_end: int  # the journal's entries before it are those of the group


class Committer:
    """The commits of one overlay. All offsets and sizes in bytes."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        tables: TableSlices,
        *,
        journal: SessionJournal,
        barriers: Barriers,
        marks: TruncationMarks,
    ) -> None:
        """`marks`: those that are found when slices are read (`secure_marks`)."""
        self._group_error: QedfsError | None = None  # of the last group
        self.uncommitted_bytes = 0  # of data written since the last group was taken
        self._storage = storage
        self._header = header
        self._tables = tables
        self._journal = journal
        self._barriers = barriers
        self._marks = marks
        self._lock = trio.Lock()
        self._barrier_lock = trio.Lock()  # taken last
        self._started = 0  # number of the group that was started last
        self._committed = 0  # number of the last group that ended well
        self._flushed = 0  # the same, of those with the second barrier
        self._running = False
        self._closed = False
        self._reread = False  # after a failed barrier
        self._cold: list[tuple[int, int]] = []

    @property
    def pending(self) -> bool:
        """Whether there are entries that the file does not have: they wait for a commit, or one is under way."""
        # The entries of a group under way are neither dirty any more nor in the file.
        return self._running or self._waiting

    @property
    def error(self) -> QedfsError | None:
        """Why the entries that wait are not in the file yet: the last group has failed. The next commit tries again."""
        return self._group_error if self.pending else None

    @property
    def _waiting(self) -> bool:
        return bool(self._tables.dirty or self._tables.unwritten)

    def note_cold(self, offset: int, size: int) -> None:
        """Data written by the stream: to be dropped from the page cache after its barrier."""
        self._cold.append((offset, size))

    def note_data(self, size: int) -> None:
        """Data was written whose entries are now in the map."""
        self.uncommitted_bytes += size

    async def commit(self) -> None:
        """Bring all entries published before this call into the file.

        Raises:
            NoSpace: nothing is lost, the entries stay in memory and the next commit tries again.
            ReadOnlyOverlay: a barrier failed, now or before.
        """
        # Before the lock: any group that starts from now on has our entries, and the one under way may lack them.
        mine = self._started + 1
        async with self._lock:
            self._check()
            if self._committed < mine and self._waiting:
                await self._run(durable=False)

    async def flush(self) -> None:
        """Commit, and make everything written before this call survive a power cut. Errors as for `commit`."""
        # As in `commit`, and of the flushed groups: one without the second barrier makes nothing durable.
        mine = self._started + 1
        async with self._lock:
            self._check()
            if self._flushed < mine:
                await self._run(durable=True)

    @contextlib.asynccontextmanager
    async def ended(self) -> AsyncIterator[None]:
        """Enter when the groups that were asked for have run; there will be no further one: who asks gets an error."""
        # Under the lock: a group may be under way in a thread, and its caller is about to give the descriptor up.
        async with self._lock:
            self._closed = True
            self._marks.close()
            yield

    def commit_now(self) -> None:
        """Commit and flush while nobody else uses the overlay, waiting for the disk."""
        if self._marks.unsecured:
            found = self._marks.found
            self._marks.write_owed()
            self._barriers.barrier()
            self._marks.secured(found)
        group = self._take()
        try:
            self._write(group, durable=True)
        except BaseException:
            self._put_back(group)
            raise
        self._landed(group)

    def mark_l1(self, indices: Iterable[int]) -> None:
        """Write these marked L1 entries, while nobody else uses the overlay. See `secure_marks`."""
        self._marks.write(list(self._l1_sectors(indices)))

    async def secure_marks(self) -> bool:
        """To be called before the file may grow, or space is allocated; returns whether that took an await.

        What marks were found are in the file, and a barrier came after them: otherwise a power cut could keep the new
        length and lose the marks, and the next session would take for good what they mark. ReadOnlyOverlay: the barrier
        failed. NoSpace: a mark found no room (some file systems never overwrite in place), and there is none yet.
        """
        if not self._marks.unsecured:
            return False
        self._check()
        found = self._marks.found  # before the barrier: it need not cover a mark that is found while it runs
        self._marks.write_owed()
        await self.durably(self._barriers.barrier)
        self._marks.secured(found)
        return True

    async def _run(self, *, durable: bool) -> None:
        """The next group; `error` tells how it went."""
        try:
            await self._run_group(durable=durable)
        except Exception as exc:
            known = exc if isinstance(exc, QedfsError) else QedfsError("internal error, see the log")
            self._group_error = known.fresh()
            raise
        self._group_error = None

    async def _run_group(self, *, durable: bool) -> None:
        # Again after each await: it may have found another mark, and `_take` lets the file grow.
        while await self.secure_marks():
            self._check()
        # No await between the snapshot and the number: the writer of an entry published there would take this group for
        # one that began after its call, and be answered although the group lacks its entry.
        self._started += 1
        group = self._take()
        self._running = True
        try:
            await self.durably(lambda: self._write(group, durable=durable))
        except BaseException:
            self._put_back(group)
            raise
        finally:
            self._running = False
        # We have had the lock all the time: `_started` is still the number of this group.
        self._committed = self._started
        if durable:
            self._flushed = self._started
        self._landed(group)

    def _landed(self, group: _Group) -> None:
        """The file has the entries, if only in its page cache: as the journal does, that survives a kill."""
        # No await in between: a slice that is dropped by the first line would be taken for empty until the second.
        self._tables.pin_slices(())
        self._tables.tables_written(group.tables)
        self._journal.landed(group.journal_end)

    def _take(self) -> _Group:
        """Everything that waits, as it is now.

        No await in here. A cluster allocated after the growth could get its entry into the file before the file reaches
        that far, and an entry published after the snapshot would go from the journal with this group, which lacks it.
        """
        tables = self._tables
        if self._waiting:
            self._grow()
        dirty = tables.take_dirty()
        unwritten = set(tables.unwritten)
        sectors = [tables.sector(number, sector) for number, changed in dirty.items() for sector in changed]
        sectors += self._l1_sectors(unwritten)
        cold, self._cold = self._cold, []
        self.uncommitted_bytes = 0
        return _Group(joined(sectors), dirty, unwritten, cold, self._journal.end)

    def _grow(self) -> None:
        """Make the file as long as what is allocated.

        On the event loop, where nobody can allocate between the look at the length and the change: in a thread, a write
        beyond the end that the group saw would be cut off again.
        """
        if self._storage.size() < self._tables.file_end:
            self._storage.resize(self._tables.file_end)

    def _put_back(self, group: _Group) -> None:
        """The entries stay in memory and dirty, whatever part of the group has reached the file."""
        if self._reread:
            return  # the map has what the disk has, and nothing is written any more
        for number, changed in group.dirty.items():
            self._tables.make_dirty(number, changed)
        # The tables are still `unwritten`, and the journal still has the entries: only `_landed` takes them out.
        self._tables.pin_slices(())  # last: until they are dirty again, it is what keeps them in memory

    def _write(self, group: _Group, *, durable: bool) -> None:
        """Steps 2 and 3 of the module's text; runs in a worker thread."""
        storage = self._storage
        if group.dirty or group.tables:
            # This one orders data before entries. If it fails, none of the entries is written.
            self._barriers.barrier()
            for offset, data in group.sectors:
                storage.write(offset, [data])
        if durable:
            # What was flushed includes its entries: without this barrier an fsync could return and its clusters
            # still read as the backing after a power cut.
            self._barriers.barrier()
        # After the first barrier: the kernel drops clean pages only.
        for offset, size in group.cold:
            storage.drop_cache(offset, size)

    async def durably(self, call: Callable[[], None]) -> None:
        """Run a call with barriers in a thread. ReadOnlyOverlay: one failed; the map now shows what the disk has."""
        # One at a time: Linux tells one caller of a lost page, and to a second fdatasync beside it all is well.
        async with self._barrier_lock:
            self._barriers.check()  # the barrier that we have waited for may have failed
            try:
                await self._storage.in_thread(call)
            except ReadOnlyOverlay:
                if self._barriers.failure is not None:
                    # Before the await, and before the caller's `_put_back`, which would make dirty what is taken back.
                    self._reread = True
                    await self._read_again()
                raise

    async def _read_again(self) -> None:
        """After a failed barrier: believe no entry and no page of which the disk may know nothing.

        What waits for a commit may point to data that was never written, and the kernel may forget any page that it
        could not write: a reader would get bytes that nobody wrote. So from here on this session shows what a power cut
        would leave, and so does whoever opens the overlay next. The entries go first: no look-up may find one of them
        once its pages are gone.
        """
        self._tables.begin_reread()
        # Until `end_reread` look-ups wait. Shielded: a cancelled caller would leave tables out that the disk has.
        unwritten = sorted(self._tables.unwritten)
        l1: dict[int, int] = {}
        try:
            with trio.CancelScope(shield=True):
                l1 = await self._storage.in_thread(lambda: self._l1_of_the_disk(unwritten))
        finally:
            self._tables.end_reread(l1)

    def _l1_of_the_disk(self, indices: Iterable[int]) -> dict[int, int]:
        with contextlib.suppress(QedfsError):  # the disk may not be well yet; what it has is all the same what it has
            self._storage.refresh()
        found: dict[int, int] = {}
        with contextlib.suppress(QedfsError):
            for index in indices:
                entry = bytearray(ENTRY_SIZE)
                self._storage.read(self._header.l1_table_offset + index * ENTRY_SIZE, memoryview(entry))
                found[index] = decode_table(entry)[0]
        return found

    def _check(self) -> None:
        self._barriers.check()
        if self._closed:
            raise ReadOnlyOverlay("the overlay is closed")

    def _l1_sectors(self, indices: Iterable[int]) -> Iterator[Write]:
        for first in {round_down(index, SECTOR_ENTRIES) for index in indices}:
            entries = self._tables.l1.part(first, SECTOR_ENTRIES)
            yield self._header.l1_table_offset + first * ENTRY_SIZE, encode_table(entries)
