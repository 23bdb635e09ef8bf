"""The cache of L2 table slices of an overlay, and the record of what the file does not have yet.

Owns the L1 entries, the cached slices of L2 tables, and the changes that are not in the file (`dirty` sectors,
`unwritten` tables). Must not know what an entry means for a reader (`clustermap.py`), and does not write to the file.
`commit.py` does, and reports what has become durable, or that a barrier has failed and entries have to be taken back
(`begin_reread`).

L2 tables are cached in *slices* of at most 64 KiB, because a legal L2 table can be 1 GiB. A slice stays in memory while
it has dirty sectors, while a group writes it, and while a task holds it (`hold`). A task holds a slice between a
look-up of its entries and a change, and also during a read, which would otherwise restore an older state of the slice.
The other slices are evicted, the oldest first, when the cache exceeds its bound.

A walk over whole tables skips the holes of the file (`hole_end`). It still examines a slice that this session has
written, because the cached hole may be out of date. If the file may grow, entries that pointed past its end at the
opening are marked when they are read (`truncation.py`), and the marks are written at once.

Slices are numbered across the whole image; a table has `per_table` of them. Only `load`, `load_slice`, `entries` and
`hole_end` await. After them, the caller must repeat any look-up that it made before.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping

import trio

from qedfs.errors import BadOverlay, NoMemory
from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE, Geometry, round_down, round_up
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.sparse import SparseTable
from qedfs.format.tables import MISSING, decode_table, empty_table, encode_table
from qedfs.host.memory_pool import Pool, Share
from qedfs.overlay.file_zeros import is_zero
from qedfs.overlay.holes import Holes
from qedfs.overlay.sectors import SECTOR_ENTRIES, joined
from qedfs.overlay.storage import Storage
from qedfs.overlay.truncation import Truncation
from qedfs.overlay.truncation_marks import TruncationMarks
from qedfs.units import format_size

SLICE_ENTRIES = 8192  # 64 KiB of a table; with 64 KiB clusters a slice maps 512 MiB of the image
GAP_STEPS = 4096  # how many L1 entries or slices one search for the end of a gap examines, 0.1 to 0.4 ms
CACHE_BYTES = 16 << 20  # per overlay: maps 128 GiB with 64 KiB clusters; less if other overlays need the memory
LEAST_SLICES = 2  # per overlay, however little memory there is, because a request may need two

Dirty = dict[int, set[int]]  # slice -> its sectors that the file does not have yet


class TableSlices:
    """The tables of one overlay."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        l1: SparseTable,
        *,
        file_end: int,
        share: Share,
        marks: TruncationMarks,
    ) -> None:
        """`l1` has only the entries inside the image. `file_end`: where the file's last whole cluster ends.

        `share`: of the memory for tables; the L1 table already counts against it. `marks`: for entries that point past
        the file's end.
        """
        geometry = header.geometry
        self.geometry = geometry
        self.file_end = file_end  # clusters must end at or before this offset
        self.l1 = l1
        self.slices: dict[int, array[int]] = {}  # in memory, oldest first
        self.dirty: Dirty = {}
        self.unwritten: set[int] = set()  # L1 indices of tables that the file does not have yet
        self.epoch = 0  # how many times entries were taken back, after a failed barrier
        self.per_table = max(1, geometry.entries // SLICE_ENTRIES)
        self.slice_entries = min(geometry.entries, SLICE_ENTRIES)  # clusters that one slice maps
        self._storage = storage
        self._header = header
        self._cluster_size = geometry.cluster_size
        self._share = share
        self._marks = marks
        self._cut = Truncation(file_end, geometry.cluster_size)
        self._holes = Holes(storage)
        self._written: set[int] = set()  # slices that a group has written or is writing
        self._pinned: frozenset[int] = frozenset()  # slices of the running group
        self._held: dict[int, int] = {}  # slice -> how many tasks hold it
        self._rereading: trio.Event | None = None  # set when look-ups may continue after a failed barrier
        self._slice_bytes = self.slice_entries * ENTRY_SIZE
        self._cache_slices = self._dirty_slices = max(LEAST_SLICES, CACHE_BYTES // self._slice_bytes)

    def grow(self, geometry: Geometry) -> None:
        """Let the image be larger. The file has no L1 entries past the old end."""
        self.geometry = geometry
        self.l1.grow(geometry.l1_used)

    # The end of the file.

    def reach(self, end: int) -> None:
        """Allow clusters up to `end`. New ones are allocated from there on."""
        self.file_end = max(self.file_end, end)

    def cut_back(self, end: int) -> None:
        """Undo `reach`, for clusters past `end` that never got an entry."""
        self.file_end = end

    def follow_growth(self) -> None:
        """Allow clusters anywhere inside the file as it is now, because another process is extending it.

        Keep the end if it is higher: a killed session's journal may refer to a cluster past the last whole one.
        """
        self.reach(self._whole_clusters_end())

    def _expect_growth(self) -> None:
        """Without locks, another process may have extended the file, and its tables may refer to the new clusters."""
        if not self._storage.locked:
            self._cut.grown_to(self._whole_clusters_end())

    def _whole_clusters_end(self) -> int:
        return round_down(self._storage.size(), self._cluster_size)

    @property
    def damage(self) -> BadOverlay | None:
        """Set if the file was truncated, according to the tables that have been read."""
        if not self._cut.lost:
            return None
        return BadOverlay(f"{self._cut.lost} clusters point to invalid places: the file was cut; run qedfs check")

    # Look-ups: synchronous.

    def table_offset(self, number: int) -> int:
        """The offset of the table of a slice; 0 if it has none."""
        return self.l1[number // self.per_table]

    def is_blank(self, number: int) -> bool:
        """Whether a slice that is not in memory has no entries, because its table does not exist or is not in the file.

        After a failed barrier it is unknown whether the file has the table, until that has been read from the disk.
        """
        index = number // self.per_table
        return not self.l1[index] or (index in self.unwritten and self._rereading is None)

    def is_loaded(self, number: int) -> bool:
        """Whether the entries of a slice can be looked up without a `load`."""
        return number in self.slices or self.is_blank(number)

    def next_table(self, number: int) -> int:
        """The first slice after this one's table that has a table, or where a search of GAP_STEPS ends."""
        return self.l1.next_filled(number // self.per_table, GAP_STEPS) * self.per_table

    async def ends_with_image(self) -> bool:
        """Whether the L1 table of the file has no entry past the image's end."""
        first, count = self.l1_place(len(self.l1)), self.geometry.entries - len(self.l1)
        return await self._storage.in_thread(lambda: is_zero(self._storage, first, count * ENTRY_SIZE))

    def l1_place(self, index: int) -> int:
        """The offset of an L1 entry."""
        return self._header.l1_table_offset + index * ENTRY_SIZE

    def _slice_place(self, number: int) -> int:
        return self.table_offset(number) + number % self.per_table * self.slice_entries * ENTRY_SIZE

    def _check_table(self, number: int) -> None:
        table = self.table_offset(number)
        if not valid_table_offset(table, self._header, self.file_end):
            raise BadOverlay(f"the L2 table at {table:#x} is not inside the file; run qedfs check")

    # In and out of memory.

    async def load(self, numbers: range) -> None:
        """Load these slices. Raises BadOverlay if an L1 entry points to an invalid place."""
        for number in numbers:
            if not self.is_loaded(number):
                self._keep(number, await self._read_slice(number))
        # Only now, and keeping all of them, because a request across two slices needs both at once.
        self._evict(numbers)

    async def load_slice(self, number: int) -> None:
        """Load one slice, even if it has no entries (`is_blank`)."""
        self._keep(number, await self._read_slice(number))
        self._evict(range(number, number + 1))

    def load_now(self, number: int) -> None:
        """Load a slice, waiting for the disk. Only before anybody else uses the tables."""
        if number not in self.slices:
            view = memoryview(bytearray(self._slice_bytes))
            if number // self.per_table not in self.unwritten:
                self._check_table(number)
                self._storage.read(self._slice_place(number), view)
            self._keep(number, decode_table(view))

    async def entries(self, number: int) -> array[int]:
        """The entries of a slice that has a table. It is kept in memory only if it has entries to be marked."""
        part = self.slices.get(number)
        if part is None:
            part = await self._read_slice(number)
            self._expect_growth()
            if self._cut.concerns(part):
                self._keep(number, part)
                self._evict(range(number, number + 1))
        return part

    async def _read_slice(self, number: int) -> array[int]:
        """The slice as of the end of the call: the one in memory if another task has loaded it meanwhile."""
        while self._rereading is not None:
            await self._rereading.wait()
        if self.is_blank(number):
            return empty_table(self.slice_entries)
        self._check_table(number)
        view = memoryview(bytearray(self._slice_bytes))
        offset = self._slice_place(number)
        if not self._storage.read_now(offset, view):
            epoch = self.epoch
            # Hold the slice. If another task loaded, changed, committed and evicted it meanwhile, the thread's result
            # would be out of date.
            self.hold(number)
            try:
                await self._storage.in_thread(lambda: self._storage.read(offset, view))
            finally:
                self.release(number)
            if epoch != self.epoch:
                return await self._read_slice(number)
        found = self.slices.get(number)
        return decode_table(view) if found is None else found

    def _keep(self, number: int, part: array[int]) -> None:
        """Put a slice that was read into the cache, and mark its bad entries."""
        if number in self.slices:
            return  # another task has loaded it meanwhile, and it may have been changed since
        self._add_slice(number, part)
        if number in self._written:
            return  # its entries past the old end are of this session, and the file has grown
        self._expect_growth()
        if (bad := self._cut.marked(number, part)) and self._storage.writable:
            self._mark(number, {index // SECTOR_ENTRIES for index in bad})

    def _mark(self, number: int, sectors: Collection[int]) -> None:
        if not self._marks.write(joined([self.sector(number, sector) for sector in sectors])):
            self.make_dirty(number, sectors)  # the slice must be usable even if the disk is full

    def hold(self, number: int) -> None:
        """Keep a slice in memory until as many `release` calls."""
        self._held[number] = self._held.get(number, 0) + 1

    def release(self, number: int) -> None:
        """Undo one `hold`."""
        self._held[number] -= 1
        if not self._held[number]:
            del self._held[number]

    def _evict(self, wanted: range) -> None:
        """Evict slices until the cache is within its bound. `wanted`: about to be used, so not evicted."""
        if not self._too_many():
            return
        for number in list(self.slices):
            if not any(number in needed for needed in (self.dirty, self._pinned, self._held, wanted)):
                del self.slices[number]
                self._share.give(self._slice_bytes)
                if not self._too_many():
                    return

    def _too_many(self) -> bool:
        count = len(self.slices)
        return count > self._cache_slices or (count > LEAST_SLICES and self._share.is_over)

    def _add_slice(self, number: int, part: array[int]) -> None:
        self.slices[number] = part
        self._share.take(self._slice_bytes)

    def check_room(self) -> None:
        """Raise NoMemory if the slices take more than all overlays together may. A session commits long before that."""
        if self._share.is_beyond:
            raise NoMemory(
                f"the journal of a killed mount needs more than the {format_size(self._share.held_bytes)} of memory "
                "available for it"
            )

    def close(self) -> None:
        """Free the memory. The map must not be used any more."""
        self.slices.clear()
        self._share.close()
        self._share = Share(Pool(0))  # a read-ahead may still load a slice, which must not count

    # New tables.

    def needs_table(self, cluster: int) -> int | None:
        """The L1 index of the table that has to be created before this cluster can be set; None if there is a table."""
        index = cluster // self.geometry.entries
        return None if self.l1[index] else index

    def sectors(self, cluster: int, count: int) -> Iterator[tuple[int, int]]:
        """Where the entries of these clusters of one table are, or will be if the table is the next new one.

        Yields (offset, size) of the sectors of L1, if the table is new, and L2.
        """
        index, first = divmod(cluster, self.geometry.entries)
        table = self.l1[index]
        if not table:
            yield round_down(self._header.l1_table_offset + index * ENTRY_SIZE, SECTOR_SIZE), SECTOR_SIZE
        start = round_down(first * ENTRY_SIZE, SECTOR_SIZE)
        size = round_up((first + count) * ENTRY_SIZE, SECTOR_SIZE) - start
        yield (table or self.file_end) + start, size

    def add_table(self, index: int, offset: int) -> None:
        """Set L1 entry `index` to a new L2 table of zeros at `offset`. The file has neither yet."""
        before = self.l1.held_bytes
        self.l1[index] = offset
        self._share.take(self.l1.held_bytes - before)
        self.unwritten.add(index)

    def make_slice(self, cluster: int) -> None:
        """Create the slice of `cluster` in memory, if its table is not in the file yet."""
        number = cluster // self.slice_entries
        # It is certainly empty: with an entry it would be dirty or pinned, and so still in memory.
        if number not in self.slices and number // self.per_table in self.unwritten:
            self._add_slice(number, empty_table(self.slice_entries))

    # Holes.

    async def hole_end(self, number: int) -> int:
        """The first slice from `number` on that may have entries: `number` itself, or a later one of its table."""
        if self._may_differ(number):
            return number
        self._check_table(number)
        place = self._slice_place(number)
        if self._holes.known(place):
            hole = self._holes.at(place)
        else:
            # In a thread, because lseek waits for writers of the file.
            hole = await self._storage.in_thread(lambda: self._holes.at(place))
        rest = self.per_table - number % self.per_table
        stop = number + min(hole // self._slice_bytes, rest, GAP_STEPS)
        # Iterate over the smaller set: the slices in the hole, or those that may differ. There may be 10^5 holes.
        if len(self.slices) + len(self._written) < stop - number:
            known = itertools.chain(self.slices, self._written)
            return min((n for n in known if number <= n < stop), default=stop)
        return next((n for n in range(number, stop) if self._may_differ(n)), stop)

    def _may_differ(self, number: int) -> bool:
        """Whether a slice may have entries even if the cached extent of the file is a hole there."""
        return number in self.slices or number in self._written

    # For the commit.

    @property
    def crowded(self) -> bool:
        """Whether dirty slices take more memory than they should. They cannot be evicted before a commit."""
        count = len(self.dirty)
        return count > self._dirty_slices or (count > LEAST_SLICES and self._share.is_over)

    def make_dirty(self, number: int, sectors: Iterable[int]) -> None:
        """Make the next group write these sectors of a loaded slice."""
        self.dirty.setdefault(number, set()).update(sectors)

    def take_dirty(self) -> Dirty:
        """Take the dirty sectors for a group, which is about to write them. Their slices are pinned in memory."""
        dirty, self.dirty = self.dirty, {}
        # At once, because nothing else keeps them in memory now, and they are needed again if the group fails.
        self.pin_slices(dirty)
        return dirty

    def tables_written(self, indices: Iterable[int]) -> None:
        """Record that the file has the L1 entries of these tables. From now on their slices are read from the file."""
        self.unwritten.difference_update(indices)

    def sector(self, number: int, sector: int) -> tuple[int, bytes]:
        """The offset of one sector of a loaded slice, and its current bytes."""
        first = sector * SECTOR_ENTRIES
        data = encode_table(self.slices[number][first : first + SECTOR_ENTRIES])
        return self.sector_place(number, sector), data

    def sector_place(self, number: int, sector: int) -> int:
        """The offset of one sector of a slice whose table exists."""
        return self._slice_place(number) + sector * SECTOR_SIZE

    def pin_slices(self, numbers: Iterable[int]) -> None:
        """Keep these slices in memory until the next call, because a group writes them.

        Also evicts: the slices of the previous group are no longer needed, and nothing else evicts if guests write only
        to new tables, which load no slices.
        """
        self._pinned = frozenset(numbers)
        self._written |= self._pinned
        self._evict(range(0))

    def forget(self) -> None:
        """Drop all entries, whether the file has them or not. Only before the file is emptied, too."""
        self.epoch += 1  # a slice that is being read counts as out of date
        self._share.give(len(self.slices) * self._slice_bytes)
        self.slices.clear()  # in place, because the cluster map uses the same dictionary
        self.dirty.clear()
        self.unwritten.clear()
        self._pinned = frozenset()
        self.l1 = SparseTable(len(self.l1))

    def begin_reread(self) -> None:
        """After a failed barrier, drop every entry that may not be on the disk. `load` then waits for `end_reread`.

        No entry may be set any more. A task that was about to set one gets the error of the barrier.
        """
        self.epoch += 1
        self._rereading = trio.Event()
        self._share.give(len(self.slices) * self._slice_bytes)
        self.slices.clear()  # in place, because the cluster map uses the same dictionary
        self.dirty.clear()
        self._pinned = frozenset()

    def end_reread(self, l1: Mapping[int, int]) -> None:
        """Continue with these L1 entries for the tables that were unwritten. Without an entry, clusters are missing."""
        # A group may have written some of them, which only the disk shows.
        for index in self.unwritten:
            self.l1[index] = l1.get(index, MISSING)
        self.unwritten.clear()
        if self._rereading is not None:
            self._rereading.set()
            self._rereading = None
