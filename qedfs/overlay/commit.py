"""The one writer of tables: brings entries from memory into the file, in groups, in an order that survives a power cut.

Owns the group commit and the flush. Must not know where the bytes come from, nor how places are found (`allocator.py`).

One group:

1. The file is made as long as what is allocated, whole clusters. A new table is a hole there, which reads as zeros.
2. **Barrier**. Without it an entry could reach the disk before its data, and a power cut would leave a cluster that
   reads as garbage where the backing had good bytes; or an L1 entry before the zeros of its table.
3. Changed sectors of the tables are written, L2 and L1, in any order: each entry stands for itself. An L2 entry without
   its L1 entry is not seen, and an L1 entry without its L2 entries leads to "missing".

A flush is a group and a **barrier** behind it. A power cut at any point leaves at worst clusters that nothing refers
to. Entries of one group are snapshots taken at its start: an entry published later has its data behind the barrier of
step 2, and belongs to the next group.

A barrier that fails ends the session's writes, and the map goes back to what the disk has (`_read_again`). Barriers run
one at a time, whoever asks for them: Linux reports a lost page to one of two that run side by side, and tells the other
that all is well.

Groups run one after the other under a lock; a caller that finds a group started after its call already done has
nothing left to do, so any number of waiting writers share one barrier.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import trio

from qedfs.errors import BadOverlay, QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import ENTRY_SIZE, round_down
from qedfs.format.header import Header
from qedfs.format.tables import decode_table, encode_table
from qedfs.overlay.clustermap import SECTOR_ENTRIES, ClusterMap
from qedfs.overlay.journal import Journal
from qedfs.overlay.storage import Storage

Write = tuple[int, bytes]


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

    def __init__(self, storage: Storage, header: Header, clusters: ClusterMap, journal: Journal | None) -> None:
        self.journal = journal
        self.failure: ReadOnlyOverlay | None = None  # set by a failed barrier, never cleared
        self._group_error: QedfsError | None = None  # of the last group
        self.uncommitted_bytes = 0  # of data written since the last group was taken
        self.barriers = 0
        self.barrier_seconds = 0.0  # spent waiting in them
        self._storage = storage
        self._header = header
        self._map = clusters
        self._lock = trio.Lock()
        self._barrier_lock = trio.Lock()  # taken last
        self._started = 0  # number of the group that was started last
        self._committed = 0  # number of the last group that ended well
        self._flushed = 0  # the same, of those with the second barrier
        self._running = False
        self._closed = False
        self._reread = False  # after a failed barrier
        self._marks = 0  # times that marks were written (`truncation.py`)
        self._durable_marks = 0  # of these, those behind which a barrier was
        self._owed_marks: list[Write] = []  # that could not be written, as they were then
        clusters.write_marks = self._write_marks
        self._cold: list[tuple[int, int]] = []

    @property
    def pending(self) -> bool:
        """Whether there are entries that the file does not have: they wait for a commit, or one is under way."""
        return self._running or self._waiting

    @property
    def error(self) -> QedfsError | None:
        """Why the entries that wait are not in the file yet: the last group has failed. The next commit tries again."""
        return self._group_error if self.pending else None

    @property
    def _waiting(self) -> bool:
        return bool(self._map.dirty or self._map.unwritten)

    def note_cold(self, offset: int, size: int) -> None:
        """Data written by the stream: to be dropped from the page cache behind its barrier."""
        self._cold.append((offset, size))

    async def commit(self) -> None:
        """Bring all entries published before this call into the file.

        Raises:
            NoSpace: nothing is lost, the entries stay in memory and the next commit tries again.
            ReadOnlyOverlay: a barrier failed, now or before.
        """
        mine = self._started + 1
        async with self._lock:
            self._check()
            if self._committed < mine and self._waiting:
                await self._run(durable=False)

    async def flush(self) -> None:
        """Commit, and make everything written before this call survive a power cut. Errors as for `commit`."""
        mine = self._started + 1
        async with self._lock:
            self._check()
            if self._flushed < mine:
                await self._run(durable=True)

    @contextlib.asynccontextmanager
    async def ended(self) -> AsyncIterator[None]:
        """Enter when the groups that were asked for have run; there will be no further one: who asks gets an error."""
        async with self._lock:
            self._closed = True
            yield

    def commit_now(self) -> None:
        """Commit and flush while nobody else uses the overlay, waiting for the disk."""
        if self._marks != self._durable_marks:
            self._write_owed_marks()
            self.barrier()
            self._durable_marks = self._marks
        group = self._take()
        try:
            self._write(group, durable=True)
        except BaseException:
            self._put_back(group)
            raise
        self._landed(group)

    def mark_l1(self, indices: Iterable[int]) -> None:
        """Write these marked L1 entries, while nobody else uses the overlay. See `secure_marks`."""
        self._mark(list(self._l1_sectors(indices)))

    async def secure_marks(self) -> bool:
        """To be called before the file may grow, or space is allocated; returns whether that took an await.

        What marks was found is in the file, and behind a barrier: otherwise a power cut could keep the new length and
        lose them, and the next session would take for good what they mark. ReadOnlyOverlay: the barrier failed.
        NoSpace: a mark found no room (some file systems never overwrite in place), and there is none yet.
        """
        if (marks := self._marks) == self._durable_marks:
            return False
        self._check()
        self._write_owed_marks()
        await self.durably(self.barrier)
        self._durable_marks = max(self._durable_marks, marks)
        return True

    def _write_marks(self, number: int, sectors: set[int]) -> None:
        """The marks in one slice, into the page cache now: a kill before the next group may find the file grown."""
        if not self._mark(_joined([self._map.sector(number, sector) for sector in sectors])):
            self._map.make_dirty(number, sectors)  # the slice must be readable on a full disk too

    def _mark(self, writes: list[Write]) -> bool:
        """Write marks, or owe them; returns whether they are written. What is owed has no entries of this session."""
        self._marks += 1
        self._owed_marks += writes
        try:
            self._check()  # behind a failed barrier the file gets nothing more, and does not grow
            self._write_owed_marks()
        except QedfsError:
            return False
        return True

    def _write_owed_marks(self) -> None:
        while self._owed_marks:
            offset, data = self._owed_marks[0]
            self._storage.write(offset, [data])
            del self._owed_marks[0]

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
        while await self.secure_marks():
            self._check()
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
        self._committed = self._started
        if durable:
            self._flushed = self._started
        self._landed(group)

    def _landed(self, group: _Group) -> None:
        self._map.pin_slices(())
        self._map.unwritten -= group.tables
        if self.journal is not None:
            self.journal.landed(group.journal_end)

    def _take(self) -> _Group:
        clusters = self._map
        if self._waiting:
            self._grow()
        dirty, clusters.dirty = clusters.dirty, {}
        clusters.pin_slices(dirty)
        tables = set(clusters.unwritten)
        sectors = [clusters.sector(number, sector) for number, changed in dirty.items() for sector in changed]
        sectors += self._l1_sectors(tables)
        cold, self._cold = self._cold, []
        self.uncommitted_bytes = 0
        return _Group(_joined(sectors), dirty, tables, cold, self.journal.end if self.journal is not None else 0)

    def _grow(self) -> None:
        """Make the file as long as what is allocated.

        On the event loop, where nobody can allocate between the look at the length and the change: in a thread, a write
        behind the end that the group saw would be cut off again.
        """
        if self._storage.size() < self._map.file_end:
            self._storage.resize(self._map.file_end)

    def _put_back(self, group: _Group) -> None:
        """The entries stay in memory and dirty, whatever part of the group has reached the file."""
        if self._reread:
            return  # the map has what the disk has, and nothing is written any more
        for number, changed in group.dirty.items():
            self._map.dirty.setdefault(number, set()).update(changed)
        self._map.pin_slices(())  # last: until they are dirty again, it is what keeps them in memory

    def _write(self, group: _Group, *, durable: bool) -> None:
        """Steps 2 and 3 of the module's text; runs in a worker thread."""
        storage = self._storage
        if group.dirty or group.tables:
            self.barrier()
            for offset, data in group.sectors:
                storage.write(offset, [data])
        if durable:
            # What was flushed includes its entries: without this barrier an fsync could return and its clusters
            # still read as the backing after a power cut.
            self.barrier()
        for offset, size in group.cold:
            storage.drop_cache(offset, size)

    def barrier(self) -> None:
        """Every barrier of the overlay goes through here, in a worker thread.

        ReadOnlyOverlay: it failed. BadOverlay: the file was cut.
        """
        self.barriers += 1
        began = time.monotonic()
        try:
            self._storage.barrier()
        except BadOverlay:
            raise  # the file was cut, which says nothing of the disk; it takes nothing more
        except QedfsError as exc:
            # Linux marks pages clean whose write-back failed: a second barrier that succeeds proves nothing.
            self.failure = ReadOnlyOverlay(
                f"{exc}; it is read-only until it is opened again, and writes since its last flush may be lost"
            )
            if (journal := self.journal) is not None:
                # Nobody knows which data the disk has: entries that were never committed must not be brought back by
                # the next session, or clusters could read as garbage.
                journal.void()
            raise self.failure.fresh() from exc
        finally:
            self.barrier_seconds += time.monotonic() - began

    async def durably(self, call: Callable[[], None]) -> None:
        """Run a call with barriers in a thread. ReadOnlyOverlay: one failed; the map now shows what the disk has."""
        # One at a time: Linux tells one caller of a lost page, and to a second fdatasync beside it all is well.
        async with self._barrier_lock:
            self._check_failure()
            try:
                await self._storage.in_thread(call)
            except ReadOnlyOverlay:
                if self.failure is not None:
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
        self._map.begin_reread()
        unwritten = sorted(self._map.unwritten)
        l1: dict[int, int] = {}
        try:
            with trio.CancelScope(shield=True):
                l1 = await self._storage.in_thread(lambda: self._l1_of_the_disk(unwritten))
        finally:
            self._map.end_reread(l1)

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

    def _check_failure(self) -> None:
        if self.failure is not None:
            raise self.failure.fresh()

    def _check(self) -> None:
        self._check_failure()
        if self._closed:
            raise ReadOnlyOverlay("the overlay is closed")

    def _l1_sectors(self, indices: Iterable[int]) -> Iterator[Write]:
        for first in {round_down(index, SECTOR_ENTRIES) for index in indices}:
            entries = self._map.l1.part(first, SECTOR_ENTRIES)
            yield self._header.l1_table_offset + first * ENTRY_SIZE, encode_table(entries)


def _joined(writes: list[Write]) -> list[Write]:
    """Neighbouring sectors as one write each, in order of offset; the last one of L1 may be cut at the image's end."""
    joined: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in sorted(writes):
        if offset == end:
            joined[-1][1].append(data)
        else:
            joined.append((offset, [data]))
        end = offset + len(data)
    return [(offset, b"".join(parts)) for offset, parts in joined]
