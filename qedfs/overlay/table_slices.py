"""The L2 tables of an overlay, slice by slice: which are in memory, and what the file lacks of them.

Owns the L1 entries, the cached slices of L2 tables, and what the file does not have yet (`dirty` sectors, `unwritten`
tables). Must not know what an entry means for a reader (`clustermap.py`), nor write to the file: `commit.py` does, and
tells what has become durable, or that a barrier has failed and entries are to be taken back (`begin_reread`).

L2 tables are cached in *slices* of at most 64 KiB, not whole: a legal L2 table can be 1 GiB. A slice stays while it has
dirty sectors, while a group writes it, and while somebody holds it (`hold`: between a look at its entries and a change
of them, or during a read of it, which would otherwise bring back what the slice was before). The others go, oldest
first, when the cache is over its bound.

What is a hole of the file in a table is passed over where whole tables are walked (`hole_end`). A slice that this
session has written is looked at itself: the hole may have been seen before. Where the file may grow, entries that
pointed beyond its end at the open are marked (`truncation.py`) when they are read, and the marks are written at once.

Slices have numbers, counted through the whole image; a table has `per_table` of them. Only `load`, `load_slice`,
`entries` and `hole_end` await; the caller must look again at whatever it had looked at before.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterable, Mapping

import trio

from qedfs.errors import BadOverlay, NoMemory
from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE, round_down
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.sparse import SparseTable
from qedfs.format.tables import MISSING, decode_table, empty_table, encode_table
from qedfs.host.memory_pool import Pool, Share
from qedfs.overlay.holes import Holes
from qedfs.overlay.sectors import SECTOR_ENTRIES, joined
from qedfs.overlay.storage import Storage
from qedfs.overlay.truncation import Truncation
from qedfs.overlay.truncation_marks import TruncationMarks
from qedfs.units import format_size

SLICE_ENTRIES = 8192  # 64 KiB of table; at 64 KiB clusters one slice describes 512 MiB of the image
GAP_STEPS = 4096  # L1 entries, or slices, looked at for the end of a gap, 0.1 to 0.4 ms
CACHE_BYTES = 16 << 20  # of slices per overlay: 128 GiB of the image at 64 KiB clusters; less if others need the room
LEAST_SLICES = 2  # of an overlay, however little room there is: a request may need two

Dirty = dict[int, set[int]]  # slice -> sectors of it that the file does not have yet


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
        """`l1` holds the entries inside the image only; `file_end`: where the file's last whole cluster ends.

        `share`: of the memory for tables; it holds what L1 takes. `marks`: for what is found to point beyond the end.
        """
        geometry = header.geometry
        self.geometry = geometry
        self.file_end = file_end  # the first byte no cluster may lie at
        self.l1 = l1
        self.slices: dict[int, array[int]] = {}  # in memory, oldest first
        self.dirty: Dirty = {}
        self.unwritten: set[int] = set()  # L1 indices of tables that the file does not have yet
        self.epoch = 0  # counts the times that entries were taken back, after a failed barrier
        self.per_table = max(1, geometry.entries // SLICE_ENTRIES)
        self.slice_entries = min(geometry.entries, SLICE_ENTRIES)  # clusters that one slice describes
        self._storage = storage
        self._header = header
        self._cluster_size = geometry.cluster_size
        self._share = share
        self._marks = marks
        self._cut = Truncation(file_end, geometry.cluster_size)
        self._holes = Holes(storage)
        self._written: set[int] = set()  # slices that a group has brought or is bringing into the file
        self._pinned: frozenset[int] = frozenset()
        self._held: dict[int, int] = {}  # slice -> how many hold it
        self._rereading: trio.Event | None = None  # until look-ups may go on
        self._slice_bytes = self.slice_entries * ENTRY_SIZE
        self._cache_slices = self._dirty_slices = max(LEAST_SLICES, CACHE_BYTES // self._slice_bytes)

    # The end of the file.

    def reach(self, end: int) -> None:
        """Let clusters lie anywhere before `end` of the file, and be allocated from there on."""
        self.file_end = max(self.file_end, end)

    def cut_back(self, end: int) -> None:
        """Undo `reach`: what was allocated from `end` on has never got an entry."""
        self.file_end = end

    def follow_growth(self) -> None:
        """Let clusters lie anywhere inside the file as it is now: somebody else writes to it.

        What a killed session has left may lie beyond the last whole cluster already.
        """
        self.reach(self._whole_clusters_end())

    def _expect_growth(self) -> None:
        """Who looks on while others write to the file finds entries in it beyond the end that it had a moment ago."""
        if not self._storage.locked:
            self._cut.end = max(self._cut.end, self._whole_clusters_end())

    def _whole_clusters_end(self) -> int:
        return round_down(self._storage.size(), self._cluster_size)

    @property
    def damage(self) -> BadOverlay | None:
        """That the file was cut, as far as the tables have been read."""
        if not self._cut.lost:
            return None
        return BadOverlay(f"{self._cut.lost} clusters point to where none can be: the file was cut; run qedfs check")

    # Look-ups: synchronous.

    def table_offset(self, number: int) -> int:
        """Where the table of a slice begins; 0: it has none."""
        return self.l1[number // self.per_table]

    def is_blank(self, number: int) -> bool:
        """Whether a slice that is not in memory has no entries: its table is not there, or not yet in the file.

        After a failed barrier the disk tells whether the file has a table, and nobody knows before that has been read.
        """
        index = number // self.per_table
        return not self.l1[index] or (index in self.unwritten and self._rereading is None)

    def is_loaded(self, number: int) -> bool:
        """Whether the entries of a slice can be looked up without a `load`."""
        return number in self.slices or self.is_blank(number)

    def next_table(self, number: int) -> int:
        """The first slice after this one's table that has a table, or where one look at L1 ends."""
        return self.l1.next_filled(number // self.per_table, GAP_STEPS) * self.per_table

    def _slice_place(self, number: int) -> int:
        return self.table_offset(number) + number % self.per_table * self.slice_entries * ENTRY_SIZE

    def _check_table(self, number: int) -> None:
        table = self.table_offset(number)
        if not valid_table_offset(table, self._header, self.file_end):
            raise BadOverlay(f"the L2 table at {table:#x} is not inside the file; run qedfs check")

    # In and out of memory.

    async def load(self, numbers: range) -> None:
        """Bring these slices into memory. BadOverlay: an L1 entry points where no table can be."""
        for number in numbers:
            if not self.is_loaded(number):
                self._keep(number, await self._read_slice(number))
        # Only now, and sparing all of them: a request over two slices needs both at once.
        self._evict(numbers)

    async def load_slice(self, number: int) -> None:
        """Bring one slice into memory, also if it has no entries (`is_blank`)."""
        self._keep(number, await self._read_slice(number))
        self._evict(range(number, number + 1))

    def load_now(self, number: int) -> None:
        """Bring a slice into memory, waiting for the disk (before anybody else uses the tables)."""
        if number not in self.slices:
            view = memoryview(bytearray(self._slice_bytes))
            if number // self.per_table not in self.unwritten:
                self._check_table(number)
                self._storage.read(self._slice_place(number), view)
            self._keep(number, decode_table(view))

    async def entries(self, number: int) -> array[int]:
        """A slice that has a table; it is brought into memory only if something in it has to be marked."""
        part = self.slices.get(number)
        if part is None:
            part = await self._read_slice(number)
            self._expect_growth()
            if self._cut.concerns(part):
                self._keep(number, part)
                self._evict(range(number, number + 1))
        return part

    async def _read_slice(self, number: int) -> array[int]:
        """The slice as it is when the call ends: from memory if somebody else has brought it there meanwhile."""
        while self._rereading is not None:
            await self._rereading.wait()
        if self.is_blank(number):
            return empty_table(self.slice_entries)
        self._check_table(number)
        view = memoryview(bytearray(self._slice_bytes))
        offset = self._slice_place(number)
        if not self._storage.read_now(offset, view):
            epoch = self.epoch
            # Held: if others loaded, changed, committed and dropped it meanwhile, what the thread has read would bring
            # back what it was before.
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
        """Have a slice in memory that was read; what is bad in it stays bad."""
        if number in self.slices:
            return  # it has come meanwhile, and may have been changed since
        self._add_slice(number, part)
        if number in self._written:
            return  # its entries beyond the end of then are this session's, and the file has grown
        self._expect_growth()
        if (bad := self._cut.marked(number, part)) and self._storage.writable:
            self._mark(number, {index // SECTOR_ENTRIES for index in bad})

    def _mark(self, number: int, sectors: Collection[int]) -> None:
        if not self._marks.write(joined([self.sector(number, sector) for sector in sectors])):
            self.make_dirty(number, sectors)  # the slice must be readable on a full disk too

    def hold(self, number: int) -> None:
        """Keep a slice in memory until as many `release` calls."""
        self._held[number] = self._held.get(number, 0) + 1

    def release(self, number: int) -> None:
        """Undo one `hold`."""
        self._held[number] -= 1
        if not self._held[number]:
            del self._held[number]

    def _evict(self, wanted: range) -> None:
        """Forget slices until the cache is within its bound; `wanted` are about to be used."""
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
        """Raise NoMemory if what waits for a commit takes more than all overlays may. A session commits long before."""
        if self._share.is_beyond:
            raise NoMemory(
                f"what a killed mount has left for it takes more than the {format_size(self._share.held_bytes)} of "
                "memory that there is room for"
            )

    def close(self) -> None:
        """Give the memory up: nobody uses the map any more."""
        self.slices.clear()
        self._share.close()
        self._share = Share(Pool(0))  # a read-ahead may still be reading a slice, which is nobody's then

    # New tables.

    def needs_table(self, cluster: int) -> int | None:
        """The L1 index that has no table yet, for a cluster that is to be set; None if the table is there."""
        index = cluster // self.geometry.entries
        return None if self.l1[index] else index

    def add_table(self, index: int, offset: int) -> None:
        """A new L2 table of zeros at `offset` belongs to L1 entry `index`; the file has neither yet."""
        before = self.l1.held_bytes
        self.l1[index] = offset
        self._share.take(self.l1.held_bytes - before)
        self.unwritten.add(index)

    def make_slice(self, cluster: int) -> None:
        """Have the slice of `cluster` in memory, if its table is one that the file does not have yet."""
        number = cluster // self.slice_entries
        # Empty for sure: with an entry it would be dirty or pinned, and still be in memory.
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
            # In a thread: lseek waits for whoever writes to the file.
            hole = await self._storage.in_thread(lambda: self._holes.at(place))
        rest = self.per_table - number % self.per_table
        stop = number + min(hole // self._slice_bytes, rest, GAP_STEPS)
        # Of the slices in the hole and those that may differ, the fewer are looked at: there may be 10^5 holes.
        if len(self.slices) + len(self._written) < stop - number:
            known = itertools.chain(self.slices, self._written)
            return min((n for n in known if number <= n < stop), default=stop)
        return next((n for n in range(number, stop) if self._may_differ(n)), stop)

    def _may_differ(self, number: int) -> bool:
        """Whether a slice may have entries where a hole was seen in the file."""
        return number in self.slices or number in self._written

    # For the commit.

    @property
    def crowded(self) -> bool:
        """Whether slices that wait for a commit take more memory than they should: others cannot go before that."""
        count = len(self.dirty)
        return count > self._dirty_slices or (count > LEAST_SLICES and self._share.is_over)

    def make_dirty(self, number: int, sectors: Iterable[int]) -> None:
        """Let the next group write these sectors of a loaded slice."""
        self.dirty.setdefault(number, set()).update(sectors)

    def take_dirty(self) -> Dirty:
        """The sectors that a group is about to write, which are not dirty from now on; their slices stay in memory."""
        dirty, self.dirty = self.dirty, {}
        # At once: nothing else keeps them in memory now, and if the group fails they are needed again.
        self.pin_slices(dirty)
        return dirty

    def tables_written(self, indices: Iterable[int]) -> None:
        """The file has the L1 entries of these tables. From now on their slices are read, not taken for empty."""
        self.unwritten.difference_update(indices)

    def sector(self, number: int, sector: int) -> tuple[int, bytes]:
        """Where one sector of a loaded slice lies in the file, and its bytes now."""
        first = sector * SECTOR_ENTRIES
        data = encode_table(self.slices[number][first : first + SECTOR_ENTRIES])
        return self._slice_place(number) + sector * SECTOR_SIZE, data

    def pin_slices(self, numbers: Iterable[int]) -> None:
        """Keep these slices in memory, beside the dirty ones, until the next call: a group writes them.

        Those that it has written may go now: writes to new tables never come to load any.
        """
        self._pinned = frozenset(numbers)
        self._written |= self._pinned
        self._evict(range(0))

    def begin_reread(self) -> None:
        """A barrier has failed: forget every entry that the file may lack. `load` waits for `end_reread`.

        No entry may be set any more: whoever was about to finds out with the error of the barrier.
        """
        self.epoch += 1
        self._rereading = trio.Event()
        self._share.give(len(self.slices) * self._slice_bytes)
        self.slices.clear()  # in place: the map looks into this very dictionary
        self.dirty.clear()
        self._pinned = frozenset()

    def end_reread(self, l1: Mapping[int, int]) -> None:
        """Go on with these L1 entries of the tables that were unwritten; without one, its clusters are missing."""
        # A group may have written some of them: only the disk tells.
        for index in self.unwritten:
            self.l1[index] = l1.get(index, MISSING)
        self.unwritten.clear()
        if self._rereading is not None:
            self._rereading.set()
            self._rereading = None
