"""Group commit: the only writer of tables. Writes entries to the file in an order that survives a power cut.

Owns the group commit and the flush. Must not know where the bytes come from, nor how space is allocated
(`allocator.py`).

Steps of a group:

1. Extend the file to the end of the allocated space, in whole clusters. A new table is a hole there and reads as zeros.
2. **Barrier**. Without it, an entry could reach the disk before its data. After a power cut the cluster would then read
   as garbage, although the backing has good bytes. Likewise an L1 entry could get there before the zeros of its table.
3. Write the changed sectors of the tables, L2 and L1, in any order, because entries are independent. An L2 entry
   without its L1 entry is invisible, and an L1 entry without L2 entries leads to "missing".

A flush is a group followed by another **barrier**. Without it, an fsync could return, and its clusters still read as
the backing after a power cut. Whatever a power cut interrupts, it leaves at worst clusters that nothing refers to. If
no entries wait, the group is empty, and the flush is one barrier for the data in place (`flush_now`); if nothing was
written since the start of the last barrier either, there is nothing to do.

A group with discards has the second barrier, too. Only after that may the space of the discarded clusters be used again
(`freed.py`). Otherwise an old entry could come back in a power cut, and show another cluster's bytes.

If there is no space for a group's entries, its discards are made durable alone (`_write_discards`).

A group takes a snapshot of the entries at its start. An entry that is published later belongs to the next group,
because its data may have been written after the barrier of step 2 started.

A failed barrier ends the session's writes, and the map goes back to what is on the disk (`_read_again`). Barriers run
one at a time. If two ran concurrently, Linux would report a lost page to only one of them, and success to the other.

Groups run one at a time under a lock. A caller is done if a group that started after its call has finished. So any
number of waiting writers share one barrier.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import trio

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE, round_down
from qedfs.format.header import Header
from qedfs.format.tables import decode_table, encode_table
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.clustermap import Freed
from qedfs.overlay.freed import FreedClusters
from qedfs.overlay.lock import Lock
from qedfs.overlay.sectors import SECTOR_ENTRIES, Write, joined, joined_ranges
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices
from qedfs.overlay.truncation_marks import TruncationMarks


@dataclasses.dataclass(slots=True)
class _Group:
    """The changes that one commit writes to the file."""

    sectors: list[Write]  # of L2 tables and L1
    dirty: dict[int, set[int]]  # the changed sectors, by slice
    tables: set[int]  # the L1 indices of new tables
    cold: list[tuple[int, int]]  # (offset, size) of data that nobody is expected to read soon
    freed: Freed  # what its discards have freed
    journal_end: int  # all entries in the journal before it are in this group, or in an earlier one
    relieved: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # those keys of `freed` that are durable


class Committer:
    """The commits of one overlay. All offsets and sizes are in bytes."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        tables: TableSlices,
        *,
        journal: SessionJournal,
        barriers: Barriers,
        marks: TruncationMarks,
        freed: FreedClusters,
    ) -> None:
        """`marks`: found when slices are read, see `secure_marks`."""
        self._group_error: QedfsError | None = None  # of the last group
        self.uncommitted_bytes = 0  # bytes of data written since the snapshot of the last group
        self._storage = storage
        self._header = header
        self._tables = tables
        self._journal = journal
        self._barriers = barriers
        self._marks = marks
        self._freed = freed
        self._lock = Lock()
        self._barrier_lock = Lock()  # acquired after the other locks
        self._started = 0  # number of the last group that was started
        self._committed = 0  # number of the last group that succeeded
        self._flushed = 0  # likewise, among the groups with the second barrier
        self._running = False
        self._closed = False
        self._reread = False  # after a failed barrier
        self._cold: list[tuple[int, int]] = []

    @property
    def pending(self) -> bool:
        """Whether there are entries that the file does not have: they wait for a commit, or one is running."""
        # The entries of a running group are neither dirty any more nor in the file yet.
        return self._running or self._waiting

    @property
    def error(self) -> QedfsError | None:
        """Why the pending entries are not in the file: the last group has failed. The next commit tries again."""
        return self._group_error if self.pending else None

    @property
    def _waiting(self) -> bool:
        return bool(self._tables.dirty or self._tables.unwritten)

    def note_cold(self, offset: int, size: int) -> None:
        """Drop this data, written by the stream, from the page cache after its barrier."""
        self._cold.append((offset, size))

    def note_data(self, size: int) -> None:
        """Count data that was written, and whose entries are now in the map."""
        self.uncommitted_bytes += size

    async def commit(self) -> None:
        """Write all entries that were published before this call to the file.

        Raises:
            NoSpace: nothing is lost. The entries stay in memory, and the next commit tries again.
            ReadOnlyOverlay: a barrier has failed, now or before.
        """
        # Before acquiring the lock: a group that starts from now on has our entries, but a running one may lack them.
        mine = self._started + 1
        async with self._lock:
            await trio.lowlevel.checkpoint()  # writers that are about to publish their entries can share this group
            self._check()
            if self._committed < mine and self._waiting:
                await self._run(durable=False)

    async def flush(self) -> None:
        """Commit, and make everything that was written before this call durable. Raises what `commit` raises."""
        # As in `commit`, but only groups with the second barrier count, because the others make nothing durable.
        mine = self._started + 1
        async with self._lock:
            self._check()
            # Nothing to do if all that was written is older than the last barrier, and no entry is still to be written.
            if self._flushed < mine and (self._waiting or self._cold or self._storage.unsynced):
                await self._run(durable=True)

    def flush_now(self, done: Callable[[Exception | None], None]) -> bool:
        """Begin a flush if one barrier is enough, or none. If it returns False, use `flush`.

        That is so if no entry waits: then all that the last barrier has not covered is data in place. `done` is called
        exactly once: with None, in any thread, as soon as everything is durable; or on the event loop, with what
        `flush` would raise. No turn of the event loop is between the barrier and this call.
        """
        if self.pending or self._closed or self._marks.unsecured or self._cold or not self._barriers.writable:
            return False
        if not self._storage.unsynced:
            done(None)
            return True
        if not self._barrier_lock.take_now():
            return False
        token = trio.lowlevel.current_trio_token()

        def ended(error: Exception | None) -> None:
            if error is not None:
                token.run_sync_soon(trio.lowlevel.spawn_system_task, self._flush_failed, error, done)
                return
            # Before `done`: whoever then flushes again is to find the lock free.
            self._barrier_lock.release_in_thread(token)
            done(None)

        try:
            self._storage.begin_in_thread(self._barriers.barrier, ended)
        except BaseException:
            self._barrier_lock.release()
            raise
        return True

    async def _flush_failed(self, error: Exception, done: Callable[[Exception | None], None]) -> None:
        """As after a failure in `durably`. Has the lock of barriers. Raises nothing: it is a task of its own."""
        try:
            await self._take_back()
        except Exception as exc:
            error = exc
        finally:
            self._barrier_lock.release()
            done(error)

    @contextlib.asynccontextmanager
    async def ended(self) -> AsyncIterator[None]:
        """Wait for the requested groups, and end the commits: later requests raise an error. Holds the lock."""
        # Under both locks, because a group, or the barrier of `flush_now`, may be running in a thread, and the caller
        # is about to close the descriptor.
        async with self._lock, self._barrier_lock:
            self._closed = True
            self._marks.close()
            yield

    @contextlib.asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Write all entries to the file, and no others within the block. Raises what `commit` raises.

        No barrier runs meanwhile: one that fails has its error from the kernel before we know it, and whoever then
        copies the file gets no error for the data that the disk lacks.
        """
        async with self._lock:
            self._check()
            if self._waiting:
                await self._run(durable=False)
            async with self._barrier_lock:
                self._check()
                yield

    def commit_now(self) -> None:
        """Commit and flush, waiting for the disk. Only while nobody else uses the overlay."""
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
        """Write these marked L1 entries. Only while nobody else uses the overlay. See `secure_marks`."""
        self._marks.write(list(self._l1_sectors(indices)))

    async def secure_marks(self) -> bool:
        """Make the marks of truncated entries durable, before the file grows or space is allocated.

        Otherwise a power cut could keep the new length but lose the marks, and the next session would consider the
        marked entries valid. Returns whether it had to await.

        Raises:
            ReadOnlyOverlay: the barrier has failed.
            NoSpace: there is no space to write a mark. (Some file systems never overwrite in place.)
        """
        if not self._marks.unsecured:
            return False
        self._check()
        found = self._marks.found  # before the barrier, which may not cover marks that are found while it runs
        self._marks.write_owed()
        await self.durably(self._barriers.barrier)
        self._marks.secured(found)
        return True

    async def _thawed(self) -> None:
        """Wait for the thaw if the file system is frozen, since the file is extended on the event loop.

        Not again after that: while threads write to the file all the time, it would always have to wait.
        """
        if self._waiting and self._storage.would_wait():
            await self._storage.in_thread(self._storage.wait_to_write)
            self._check()

    async def _run(self, *, durable: bool) -> None:
        """Run the next group, and set `error`."""
        try:
            await self._run_group(durable=durable)
        except Exception as exc:
            known = exc if isinstance(exc, QedfsError) else QedfsError("internal error, see the log")
            self._group_error = known.fresh()
            raise
        self._group_error = None

    async def _run_group(self, *, durable: bool) -> None:
        await self._thawed()
        # Again after each await, during which another mark may have been found, because `_take` extends the file.
        while await self.secure_marks():
            self._check()
        # No await between the snapshot and the number. If an entry were published there, its writer would take this
        # group for one that started after its call, and return although the group lacks its entry.
        self._started += 1
        group = self._take()
        durable = durable or bool(group.freed)
        self._running = True
        try:
            await self.durably(lambda: self._write(group, durable=durable))
        except BaseException:
            self._put_back(group)
            raise
        finally:
            self._running = False
        # We have held the lock all the time, so `_started` is still the number of this group.
        self._committed = self._started
        if durable:
            self._flushed = self._started
        self._landed(group)

    def _landed(self, group: _Group) -> None:
        """Drop the group's entries from journal and caches. The file has them, perhaps only in the page cache.

        That is enough: like the journal, the page cache survives a kill.
        """
        # No await in between: until the second line, a slice that the first line evicts would be considered empty.
        self._tables.pin_slices(())
        self._tables.tables_written(group.tables)
        if self._journal.landed(group.journal_end):
            self._freed.landed(group.freed)

    def _take(self) -> _Group:
        """Take a snapshot of all pending changes, after extending the file.

        There must be no await in here. If a cluster were allocated after the file was extended, its entry could be
        written before the file is long enough. If an entry were published after the snapshot, it would be dropped from
        the journal with this group, which lacks it.
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
        return _Group(joined(sectors), dirty, unwritten, cold, self._freed.take(), self._journal.end)

    def _grow(self) -> None:
        """Extend the file to the end of the allocated space.

        This runs on the event loop, so that nobody writes between the check of the length and the change. In a thread,
        a concurrent write past the end would be cut off again.
        """
        if self._storage.size() < self._tables.file_end:
            self._storage.resize(self._tables.file_end)

    def _put_back(self, group: _Group) -> None:
        """After a failure, make the group's entries dirty again, whatever part of them has reached the file."""
        if self._reread:
            return  # the map shows what is on the disk, and nothing more is written
        for number, changed in group.dirty.items():
            self._tables.make_dirty(number, changed)
        self._freed.landed({key: group.freed.pop(key) for key in group.relieved})
        self._freed.put_back(group.freed)
        # The tables are still `unwritten`, and the journal still has the entries, as only `_landed` removes them.
        self._tables.pin_slices(())  # last, because the pins keep the slices in memory until they are dirty again

    def _write(self, group: _Group, *, durable: bool) -> None:
        """Steps 2 and 3 of the module docstring. Runs in a worker thread."""
        storage = self._storage
        if group.dirty or group.tables:
            # This barrier orders data before entries. If it fails, none of the entries is written.
            self._barriers.barrier()
            try:
                for offset, data in group.sectors:
                    storage.write(offset, [data])
            except NoSpace:
                self._write_discards(group)
                raise
        if durable:
            # A flush must make the entries durable, too. Without this barrier, clusters could read as the backing after
            # a power cut, although their fsync has returned.
            self._barriers.barrier()
        # After the first barrier, because the kernel only drops clean pages.
        for offset, size in joined_ranges(group.cold):
            storage.drop_cache(offset, size)

    def _write_discards(self, group: _Group) -> None:
        """There is no space for some entries of a group. Make its discards durable, so that their space comes back.

        They need none: where an entry of data was, the file has a block, unless the file system never overwrites in
        place. The journal keeps the entries of the whole group, which the next one writes again. That a discarded
        cluster had data before is no contradiction there, because the discard follows.
        """
        places = {self._tables.sector_place(*key): key for key in group.freed}
        for offset, data in group.sectors:
            for at in range(0, len(data), SECTOR_SIZE):
                if (key := places.get(offset + at)) is not None:
                    with contextlib.suppress(NoSpace):
                        self._storage.write(offset + at, [data[at : at + SECTOR_SIZE]])
                        group.relieved.append(key)
        if group.relieved:
            self._barriers.barrier()  # as after a whole group with discards

    async def durably(self, call: Callable[[], None]) -> None:
        """Run a call with barriers in a thread.

        Raises ReadOnlyOverlay if a barrier has failed. The map then shows what is on the disk.
        """
        # One at a time: of two concurrent fdatasyncs, Linux reports a lost page to only one.
        async with self._barrier_lock:
            self._barriers.check()  # a barrier that we have waited for may have failed
            try:
                await self._storage.in_thread(call)
            except ReadOnlyOverlay:
                await self._take_back()
                raise

    async def _take_back(self) -> None:
        """If a barrier has failed, let the map show what is on the disk. The caller has the lock of barriers."""
        if self._barriers.failure is not None:
            # Before the await and the caller's `_put_back`, which would make the dropped entries dirty again.
            self._reread = True
            await self._read_again()

    async def _read_again(self) -> None:
        """After a failed barrier, drop every entry and page that may not be on the disk.

        Pending entries may point to data that was never written, and the kernel may drop any page that it could not
        write, so a reader could get bytes that nobody wrote. From now on this session shows what would be left after a
        power cut, as will the next one. The entries are dropped first, because no look-up may find an entry whose pages
        are gone.
        """
        self._tables.begin_reread()
        # Look-ups wait until `end_reread`. Shielded, because a cancelled caller would leave out tables on the disk.
        unwritten = sorted(self._tables.unwritten)
        l1: dict[int, int] = {}
        try:
            with trio.CancelScope(shield=True):
                l1 = await self._storage.in_thread(lambda: self._l1_of_the_disk(unwritten))
        finally:
            self._tables.end_reread(l1)

    def _l1_of_the_disk(self, indices: Iterable[int]) -> dict[int, int]:
        with contextlib.suppress(QedfsError):  # the disk may still fail, but what can be read counts
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
