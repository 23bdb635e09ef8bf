"""An open QED overlay: map, read, write, discard, adopt, move, drop, grow, flush, detach, empty.

Owns the rule that decides whose bytes win when a guest writes to a cluster that is being fetched. `pending.py` tracks
such clusters, `cluster_writer.py` allocates and writes, `adoption.py` stores fetched clusters, `open_session.py` has
the header and the record, `state.py` tells how the overlay is. Must not know sources or the network: the caller
supplies the contents of missing clusters.

Concurrency protocol
--------------------
Everything runs on one event loop. The state changes only between two awaits.

- An entry changes from missing to zero or data, or from zero to data, and with a discard to zero, whatever it was. A
  move changes it from data to a copy of the same data (`relocation.py`). It becomes missing again in two cases. A drop
  (`dropping.py`) does that if the backing has the same bytes, durably; a reader that looks up its runs again must
  expect that. And a failed barrier takes back all entries that may not be on the disk (`Committer.durably`) and
  increments `epoch`. A reader whose runs are from an earlier `epoch` reads again. A writer that is about to publish
  entries gets the error.
- A cluster is *claimed* from its allocation until its entry is set, if a worker thread writes the data in between. A
  write to a claimed cluster, or a discard of it, waits for the end of the claim and then looks it up again. An adoption
  skips the cluster.
  So a guest's bytes always overwrite fetched ones, never the other way round.
- While a partial write waits for the rest of its clusters, adoptions skip them, because the write stores them whole.
- There must be no await between the look-up of entries and the allocation. `PendingAllocations.settle` is the last one.
- A read looks up its runs once. A write that returned before the read started is included. A concurrent write may or
  may not be seen, as on any disk.
- A read or a write in place may still be under way where the data of a discarded or moved cluster was. Both count as
  `accesses` from the look-up on, if they await after it. Nothing else is stored there before they have ended
  (`freed.py`).
- When a write has failed, its clusters are free once its thread has ended (`allocator.py`): nothing ever referred to
  them.
- Only `commit.py` writes tables, under its lock.

A write is acknowledged when its data is in the page cache and its entries are in the session journal or, without a
journal, committed. Either way it survives the death of the process.
"""

from __future__ import annotations

import contextlib

import trio

from qedfs.errors import NoSpace, ReadOnlyOverlay
from qedfs.format.record import Pin
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.adoption import Adoption
from qedfs.overlay.cluster_writer import ClusterWriter
from qedfs.overlay.clustermap import Run
from qedfs.overlay.cold_reads import ColdReads
from qedfs.overlay.discard import Discards
from qedfs.overlay.dropping import Dropping
from qedfs.overlay.ending import Ending
from qedfs.overlay.fill import Fill, filled
from qedfs.overlay.fragments import Fragments, fragments
from qedfs.overlay.open_session import Change
from qedfs.overlay.parts import Parts
from qedfs.overlay.relocation import Relocation
from qedfs.overlay.resize import Resizing
from qedfs.overlay.split import partial_clusters
from qedfs.overlay.state import OverlayState
from qedfs.overlay.stillness import Stillness
from qedfs.overlay.storage import Buffer, Storage

MAX_READ_BYTES = 1 << 20  # the maximal size of a FUSE read
# How long a close gives space back. The rest is left to a later session: on a file server, a punch takes a round trip.
PUNCH_SECONDS = 10.0
# The buffer for reads on the event loop, for all overlays. A caller passes on its view of it before the next read.
_SCRATCH = memoryview(bytearray(MAX_READ_BYTES))


class Overlay(OverlayState):
    """An open overlay. Positions are bytes of the image, offsets bytes of the overlay file."""

    def __init__(self, parts: Parts, *, backing: str | None, journal_remark: str, found_mark: str) -> None:
        """Takes over what `open.py` has made. See `OverlayState`."""
        super().__init__(parts, backing=backing, journal_remark=journal_remark, found_mark=found_mark)
        self.flush_now = parts.committer.flush_now  # an fsync tries this before `flush`
        self._cold_reads = ColdReads(parts.storage)
        self._loop_writes = parts.loop_writes
        self._journal = parts.journal
        self._pending = parts.pending
        self._room = parts.room
        self._writer = ClusterWriter(parts)
        self._discards = Discards(parts)
        self._resizing = Resizing(parts, self.flush)
        self.relocation = Relocation(parts)
        self.dropping = Dropping(parts)
        self._ending = Ending(parts)
        self.still = Stillness(parts).still
        self._adoption = Adoption(parts, self._writer)

    def inherit_failure(self, text: str) -> None:
        """Take no writes, and end with this error, as a barrier of this mount has failed before this opening."""
        self._barriers.failure = ReadOnlyOverlay(text)

    async def change_record(self, change: Change, *, revoke: bool = True) -> None:
        """Change the record durably. Calls take effect in order. An error undoes only this change.

        `revoke`: if the barrier fails, the next session is to have the record without the change; otherwise with it.

        If the disk has been full since the opening, the change becomes durable when the session starts.
        """
        await self._session.change_record(change, revoke=revoke)

    async def ready(self) -> None:
        """Start the session, if the disk was full at the opening. Raises NoSpace if it still is."""
        await self._session.ready()

    # Read.

    def read_now(self, pos: int, size: int) -> memoryview | None:
        """The bytes of a request if they are data in one piece of the file and in the page cache; otherwise None.

        The view is of a buffer that the next call, for any overlay, overwrites. So pass it on before the next await.
        (A FUSE reply is sent by the code that awaited us, without an await in between.)
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
        """The runs of a request inside the image. Raises BadOverlay for an invalid entry."""
        while (runs := self.clusters.runs(pos, size)) is None:
            await self.clusters.load(pos, size)
        return runs

    def map_now(self, pos: int, size: int) -> list[Run] | None:
        """Like `map` if no table has to be read; otherwise None."""
        return self.clusters.runs(pos, size)

    def is_loaded(self, pos: int, size: int) -> bool:
        """Whether the tables of a request are in memory."""
        return self.clusters.is_loaded(pos, size)

    async def load(self, pos: int, size: int) -> None:
        """Load the tables of a request into memory. Raises what `map` raises."""
        await self.clusters.load(pos, size)

    def follow_growth(self) -> None:
        """Accept entries inside the current length of the file, which a mount may extend. Call this after `load`."""
        self.tables.follow_growth()

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Enter this after `map`, without an await in between, to keep its data runs valid meanwhile."""
        return self._freed.accesses.running()

    async def read_data(self, offset: int, view: memoryview) -> None:
        """Fill `view` from a data run, inside `reading`."""
        if not self.storage.read_now(offset, view):
            await self._cold_reads.read(offset, view)

    # Missing clusters: see the methods of the same names in `clustermap.py`.

    async def count_missing(self) -> None:
        """Count the missing clusters. Raises BadOverlay if a table is invalid, after reading all others."""
        await self.clusters.missing_count.count()

    async def fragments(self) -> Fragments:
        """In how many pieces the data is. Raises BadOverlay if a table is invalid."""
        return await fragments(self.tables, self.clusters)

    async def next_missing(self, cluster: int, most: int) -> tuple[int, int] | None:
        """The first run of missing clusters at or after `cluster`: (first, count), at most `most` clusters long."""
        return await self.clusters.next_missing(cluster, most)

    async def gap(self, cluster: int) -> int:
        """How many clusters from here on are missing because there is no table, or only a hole of the file in it."""
        return await self.clusters.gap(cluster)

    async def seek(self, cluster: int, stop: int, *, hole: bool, missing_is_hole: bool) -> int:
        """The first cluster from `cluster` on that is in a hole (or not in one); `stop` if none is before it."""
        return await self.clusters.seek(cluster, stop, hole=hole, missing_is_hole=missing_is_hole)

    def all_missing(self, cluster: int, count: int) -> bool:
        """Whether none of these clusters has an entry. False if the tables in memory cannot tell."""
        return self.clusters.all_missing(cluster, count)

    def count_missing_in(self, pos: int, size: int) -> int:
        """How many bytes of this range are in missing clusters, counted as whole clusters, as far as memory can tell.

        A cluster whose table has not been loaded counts as missing.
        """
        first, end = pos // self.cluster_size, -(-(pos + size) // self.cluster_size)
        return self.clusters.count_missing_in(first, end - first) * self.cluster_size

    def has_table(self, cluster: int) -> bool:
        """Whether there is an L2 table for this cluster."""
        return self.clusters.has_table(cluster)

    # Write.

    def write_now(self, pos: int, data: Buffer) -> bool:
        """Write in place if that is one piece of data clusters and need not wait. If it returns False, use `write`.

        So do if there is no space, for a hole in a cluster or for a copy on write: `write` then makes room. A part may
        have been written. Raises what else `write` raises.
        """
        if not self._barriers.writable or not self.times.may_move:
            return False
        if not self._journal.takes_entries and (self.committer.pending or self.full):
            return False  # the entry of this cluster may be pending, and would have to be committed first
        offset = self.clusters.data_offset(pos, len(data))
        if not offset or not self._loop_writes.may_begin(len(data)):
            return False
        try:
            self.storage.write(offset, (data,))
        except NoSpace:
            return False
        finally:
            # After the write, even if it fails: the final mtime must not be earlier than the new bytes.
            self.times.move()
            self._loop_writes.ended()
        return True

    async def write(self, pos: int, data: Buffer, fill: Fill) -> None:
        """Write inside the image.

        In a cluster without data, the rest is zeros if it was a zero cluster, the result of `fill` if it was missing.

        Raises:
            NoSpace: a part may have been written. ReadOnlyOverlay: the overlay takes no writes.
            QedfsError: whatever `fill` raised. Nothing was written.
        """
        try:
            await self._write(pos, data, fill)
        except NoSpace:
            if not await self._room.make():
                raise
            await self._write(pos, data, fill)

    async def _write(self, pos: int, data: Buffer, fill: Fill) -> None:
        await self._session.ready()
        # Before the data: otherwise, after a kill, the image could show new bytes with its old times.
        await self._session.let_times_move()
        view = memoryview(data)
        rest: dict[int, Buffer] = {}
        with self._pending.merging(self._partial_clusters(pos, len(view))):
            # After every await, examine the clusters again, because their state may have changed.
            while True:
                await self._pending.settle(pos, len(view))
                if await self.committer.secure_marks():
                    continue
                lacking = [c for c in self._partial_clusters(pos, len(view)) if c not in rest and self._is_missing(c)]
                if not lacking:
                    break
                rest |= await filled(lacking, fill)
            # A barrier may have failed while we waited. Then no empty slice may be created.
            self._barriers.check_writable()
            writes, entries = self._writer.place(pos, view, rest)
            now = self._loop_writes.may_begin(len(view))
            try:
                await self._writer.write(writes, entries, now=now)
            finally:
                self.times.move()
                if now:
                    self._loop_writes.ended()
        if self.committer.pending and (not self._journal.takes_entries or self.tables.crowded):
            await self.committer.commit()
            if not self._journal.takes_entries:
                await self._session.note_no_journal()

    async def discard(self, cluster: int, count: int) -> int:
        """Turn whole clusters into zero clusters, whatever they were. Returns how many of them were missing.

        Raises what `write` raises. Some of them may have become zeros then.
        """
        return await self._discards.discard(cluster, count, missing_too=self.backing is not None)

    async def give_space_back(self) -> bool:
        """Give the space of discarded and moved clusters back, see `FreedClusters.give_back`. Raises nothing."""
        return await self._freed.give_back()

    async def commit_and_give_back(self) -> None:
        """Commit, then give back all that is free by now. Raises what `commit` raises."""
        await self.commit()
        while self.has_space_to_give_back and await self.give_space_back():
            pass

    async def reads_as_zeros(self, cluster: int) -> bool:
        """Whether a cluster is a zero cluster, or missing while there is no backing."""
        await self._pending.settle(cluster * self.cluster_size, 1)
        entry = self.clusters.entry(cluster)
        return entry == ZERO or (entry == MISSING and self.backing is None)

    async def set_modified(self, modified_ns: int) -> None:
        """Set the mtime of the image. Raises what `write` raises."""
        await self._session.ready()
        await self._session.let_times_move()
        self.times.set(modified_ns)

    def _is_missing(self, cluster: int) -> bool:
        # Without a backing a missing cluster reads as zeros, like a zero cluster.
        return self.backing is not None and self.clusters.entry(cluster) == MISSING

    def _partial_clusters(self, pos: int, size: int) -> list[int]:
        return partial_clusters(pos, size, self.cluster_size, self.image_size)

    # Adopt.

    async def adopt(self, pos: int, buffer: bytearray, size: int, *, cold: bool = False) -> int:
        """Store the fetched bytes of all clusters that are still missing. Returns how many bytes were stored.

        Args:
            pos: start of a cluster.
            buffer: its first `size` bytes are the image's bytes at `pos`, in whole clusters, except that the last one
                may end with the image. It must not change before the call has ended.
            cold: no reader has asked for these bytes, so they need not stay in the page cache.

        Raises:
            NoSpace: no cluster with data was stored.
            ReadOnlyOverlay: the overlay takes no writes.
        """
        return await self._adoption.adopt(pos, buffer, size, cold=cold)

    def pending(self, cluster: int, count: int) -> list[int]:
        """Which of these clusters an adoption would skip, because a write is about to give them an entry."""
        return self._pending.pending_in(range(cluster, cluster + count))

    async def adopt_zeros(self, cluster: int, count: int) -> None:
        """Turn those of these clusters that are missing into zero clusters, because the source has a hole there."""
        await self._adoption.adopt_zeros(cluster, count)

    async def inspect(self) -> None:
        """Raise BadOverlay if the file is no longer the overlay that was opened. Takes some microseconds.

        Call this regularly, and before reporting anything about the overlay as a whole.
        """
        await self._session.inspect()

    async def commit(self) -> None:
        """Write all entries to the file."""
        if self.full and self.committer.pending:
            await self._session.ready()
        await self._room.with_room(self.committer.commit)

    async def flush(self) -> None:
        """Make everything that was written before this call durable. Raises what `Committer.commit` raises."""
        if not self.storage.writable:
            return
        if self.full and self.committer.pending:
            await self._session.ready()
        await self._room.with_room(self.committer.flush)

    async def detach(self) -> None:
        """Drop the backing, when every byte of the image that is not zero is in the overlay.

        The flush comes first. Without its barrier the header could reach the disk before the last entries. A power cut
        would then leave an overlay without backing whose last clusters read as zeros.
        """
        with self.dropping.not_during_detach():
            await self._session.ready()
            await self.inspect()
            if self.damage is not None:
                raise self.damage.fresh()
            await self.committer.flush()
            await self._session.detach()
        self.backing = None

    async def move_backing(self, name: str, pin: Pin | None) -> None:
        """Give the overlay another backing name, which the caller has compared. `pin`: of it; None if none is known.

        Raises:
            UsageError: it has been dropped meanwhile.
            QedfsError: the header has no room for it, or the disk failed; see `Session.move_backing`.
        """
        await self._session.ready()
        await self._session.move_backing(name.encode(), pin)
        self.backing = name

    async def grow(self, image_size: int) -> None:
        """Let the image end later, at `image_size` bytes. Durable, and no await follows the change in memory.

        What is new reads as zeros, if the backing is not larger than the image was. The missing clusters may have to be
        counted again (`count_missing`).

        Raises:
            UsageError: that is less than it has, not a multiple of 512, or more than the tables can map.
            NoSpace, ReadOnlyOverlay, BadOverlay, InStandby: it has the old size.
        """
        await self._resizing.grow(image_size)
        self.geometry = self.clusters.geometry

    async def shrink(self, image_size: int) -> None:
        """Let the image end earlier, if only zeros and missing clusters go. Nobody else uses the overlay.

        It can only be closed afterwards. Raises what `grow` raises; UsageError also if data would go.
        """
        await self._resizing.shrink(image_size)

    async def close(self) -> None:
        """Flush if writable, and close the file. The journal is removed if the overlay has all entries.

        Raises:
            NoSpace: there is no space for pending entries. The journal has them.
            ReadOnlyOverlay: a barrier has failed, now or at any time before, so acknowledged writes may be lost.
            BadOverlay: the file was truncated or overwritten.
        """
        in_order = False
        try:
            if self.writable:
                await self.flush()
                in_order = True
                self.relocation.punch_again()
                with trio.move_on_after(PUNCH_SECONDS):
                    await self.give_space_back()
                    while self.relocation.put_off_bytes and await self.give_space_back():
                        pass
        finally:
            await self._ending.close(in_order=in_order)
        if self.storage.writable and self.storage.damage is not None:
            raise self.storage.damage.fresh()
        self._barriers.check()

    async def empty(self) -> Storage:
        """Drop all clusters, and end this object. The file stays open, for `open_storage`. See `Ending.empty`."""
        return await self._ending.empty()

    async def drop_committed(self) -> None:
        """Drop all clusters, whose bytes the backing has, too, and close the file. See `Ending.drop_committed`."""
        await self._ending.drop_committed()

    def close_now(self) -> None:
        """Close the file of an overlay that is open read-only, without waiting for anything."""
        self.storage.close()
        self.tables.close()
