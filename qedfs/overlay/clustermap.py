"""Which cluster of the image is where: the tables in memory, including entries that are not yet in the file.

Owns the L1 entries, the cached slices of L2 tables, and the marks of what the file does not have yet (`dirty` sectors,
`unwritten` tables). Must not write to the file: `commit.py` does, and tells the map what has become durable, or that a
barrier has failed and entries are to be taken back (`begin_reread`).

L2 tables are cached in *slices* of at most 64 KiB, not whole: a legal L2 table can be 1 GiB. A slice stays while it has
dirty sectors, while a group writes it, and while somebody holds it (`hold`: between a look at its entries and a change
of them, or during a read of it, which would otherwise bring back what the slice was before). The others go, oldest
first, when the cache is over its bound.

What is a hole of the file in a table is passed over where whole tables are walked (`gap`). A slice that this session
has written is looked at itself: the hole may have been seen before. Where the file may grow, entries that were behind
its end at the open are marked (`truncation.py`) when they are read, and the committer is told.

Changes happen on the event loop between two awaits, so a look-up never sees half of one. Only `load`, `gap`, `count`
and `next_missing` await; whoever calls them must look again at whatever it had looked at before.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import trio

from qedfs.errors import BadOverlay, NoMemory
from qedfs.format.geometry import ENTRY_SIZE, SECTOR_SIZE, round_down
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.sparse import SparseTable
from qedfs.format.tables import MISSING, ZERO, decode_table, empty_table, encode_table
from qedfs.host.memory_pool import Pool, Share
from qedfs.overlay.holes import Holes
from qedfs.overlay.sectors import SECTOR_ENTRIES, joined
from qedfs.overlay.storage import Storage
from qedfs.overlay.truncation import Truncation
from qedfs.overlay.truncation_marks import TruncationMarks
from qedfs.units import format_size

SLICE_ENTRIES = 8192  # 64 KiB of table; at 64 KiB clusters one slice describes 512 MiB of the image
COUNT_AT_ONCE = 32  # slices or holes looked at between two turns of the event loop
GAP_STEPS = 4096  # L1 entries, or slices, looked at for the end of a gap, 0.1 to 0.4 ms
CACHE_BYTES = 16 << 20  # of slices per overlay: 128 GiB of the image at 64 KiB clusters; less if others need the room
LEAST_SLICES = 2  # of an overlay, however little room there is: a request may need two

Dirty = dict[int, set[int]]  # slice -> sectors of it that the file does not have yet


class Run(NamedTuple):
    """Neighbouring clusters in one state, clipped to what was asked for.

    `offset` is where the bytes at `pos` lie in the overlay, for data; else MISSING or ZERO. `size` in bytes.
    """

    offset: int
    pos: int
    size: int


class ClusterMap:
    """The map of one overlay."""

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
        self._storage = storage
        self._header = header
        self.geometry = geometry
        self.file_end = file_end  # the first byte no cluster may lie at
        self.l1 = l1
        self.dirty: Dirty = {}
        self.unwritten: set[int] = set()  # L1 indices of tables that the file does not have yet
        self.missing: int | None = None  # clusters; None until `count` has ended
        self._counted_to = 0  # slices below this one are part of _counted_missing
        self._counted_missing = 0
        self._uncountable: BadOverlay | None = None  # the first table that cannot be
        self._slices: dict[int, array[int]] = {}
        self._share = share
        self._holes = Holes(storage)
        self._written: set[int] = set()  # slices that a group has brought or is bringing into the file
        self._marks = marks
        self._cut = Truncation(file_end, geometry.cluster_size)
        self._pinned: frozenset[int] = frozenset()
        self.epoch = 0  # counts the times that entries were taken back, after a failed barrier
        self._rereading: trio.Event | None = None  # until look-ups may go on
        self._held: dict[int, int] = {}  # slice -> how many hold it
        self._per_table = max(1, geometry.entries // SLICE_ENTRIES)
        self.slice_entries = min(geometry.entries, SLICE_ENTRIES)  # clusters that one slice describes
        self._shift = self.slice_entries.bit_length() - 1
        self._mask = self.slice_entries - 1
        self._cluster_size = geometry.cluster_size
        self._cluster_shift = geometry.cluster_size.bit_length() - 1
        self._cluster_mask = geometry.cluster_size - 1
        self._slice_bytes = self.slice_entries * ENTRY_SIZE
        self._cache_slices = self._dirty_slices = max(LEAST_SLICES, CACHE_BYTES // self._slice_bytes)

    # Look-ups: synchronous, on the read path.

    def data_offset(self, pos: int, size: int) -> int:
        """Where a request inside one data cluster lies in the file; 0 for every other request."""
        start = pos & self._cluster_mask
        if start + size > self._cluster_size:
            return 0
        cluster = pos >> self._cluster_shift
        part = self._slices.get(cluster >> self._shift)
        if part is None:
            return 0
        offset = part[cluster & self._mask]
        return self.checked(offset, cluster) + start if offset > ZERO else 0

    def entry(self, cluster: int) -> int:
        """The entry of a cluster whose slice is loaded."""
        number = cluster >> self._shift
        part = self._slices.get(number)
        if part is None:
            if not self._is_blank(number):
                raise LookupError(cluster)
            return MISSING
        return part[cluster & self._mask]

    def runs(self, pos: int, size: int) -> list[Run] | None:
        """Split a request into runs, or None if a slice has to be loaded first (`load`).

        Raises:
            BadOverlay: an entry on the way points where no cluster can be.
        """
        runs: list[Run] = []
        cluster_size = self._cluster_size
        end = pos + size
        while pos < end:
            cluster = pos >> self._cluster_shift
            try:
                entry = self.entry(cluster)
            except LookupError:
                return None
            start = pos & self._cluster_mask
            length = min(cluster_size - start, end - pos)
            offset = self.checked(entry, cluster) + start if entry > ZERO else entry
            if runs and _continues(runs[-1], offset):
                last = runs[-1]
                runs[-1] = Run(last.offset, last.pos, last.size + length)
            else:
                runs.append(Run(offset, pos, length))
            pos += length
        return runs

    def is_loaded(self, pos: int, size: int) -> bool:
        """Whether `runs` of this request would answer."""
        return all(number in self._slices or self._is_blank(number) for number in self._slices_of(pos, size))

    async def load(self, pos: int, size: int) -> None:
        """Bring the slices of a request into the cache.

        Raises:
            BadOverlay: an L1 entry on the way points where no table can be.
        """
        for number in (wanted := self._slices_of(pos, size)):
            if number not in self._slices and not self._is_blank(number):
                await self._load_slice(number)
        self._evict(wanted)

    async def next_missing(self, cluster: int, most: int) -> tuple[int, int] | None:
        """The first run of missing clusters at or after `cluster`: (first, count), at most `most` clusters long.

        A stretch without an L2 table costs one step, however large it is. None: there is no further one.
        """
        clusters = self.geometry.clusters
        full = 0
        while cluster < clusters:
            number = cluster >> self._shift
            limit = min((number + 1) << self._shift, clusters)
            if not self._table_offset(number):
                return cluster, min(most, limit - cluster)
            if number not in self._slices:
                await self._load_slice(number)
                self._evict(range(number, number + 1))
                continue
            part = self._slices[number]
            at = _index(part, MISSING, cluster & self._mask, limit - (number << self._shift))
            if at < 0:
                cluster, full = limit, full + 1
                if full % COUNT_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                continue
            cluster = (number << self._shift) + at
            count = 1
            while count < most and cluster + count < limit and part[at + count] == MISSING:
                count += 1
            return cluster, count
        return None

    async def gap(self, cluster: int) -> int:
        """How many clusters from here on are missing for want of a table, or of anything but a hole in it.

        0: look at the entries. More may follow behind the end of a gap.

        Raises:
            BadOverlay: the L1 entry points where no table can be.
        """
        number = cluster >> self._shift
        stop = await self._hole_end(number) if self._table_offset(number) else self._next_table(number)
        return max(0, min(stop << self._shift, self.geometry.clusters) - cluster)

    def all_missing(self, cluster: int, count: int) -> bool:
        """Whether none of these clusters has an entry, as far as the cache can tell now."""
        try:
            return all(self.entry(number) == MISSING for number in range(cluster, cluster + count))
        except LookupError:
            return False

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

    # Changes: synchronous, on the event loop.

    def set(self, cluster: int, entry: int) -> None:
        """Let `cluster` be `entry` from now on, in memory; the commit brings it into the file.

        The table and the slice must be there (`needs_table`, `load`).
        """
        number = cluster >> self._shift
        part = self._slices[number]
        index = cluster & self._mask
        if part[index] == MISSING and number < self._counted_to:
            self._counted_missing -= 1
            if self.missing is not None:
                self.missing -= 1
        part[index] = entry
        self.make_dirty(number, {index // SECTOR_ENTRIES})

    def set_zeros(self, first: int, count: int) -> None:
        """As `set` to ZERO, for those of neighbouring clusters that are missing: 10 us for 2048 that all are."""
        stop = first + count
        while first < stop:
            number, start = first >> self._shift, first & self._mask
            end = min(self.slice_entries, start + stop - first)
            self._set_zeros_of(number, start, end)
            first += end - start

    def _set_zeros_of(self, number: int, start: int, end: int) -> None:
        part = self._slices[number]
        if part[start:end].tobytes().count(0) == (end - start) * ENTRY_SIZE:
            changed: Sequence[int] = range(start, end)
            part[start:end] = array("Q", (ZERO,)) * (end - start)
        else:
            changed = [index for index in range(start, end) if part[index] == MISSING]
            for index in changed:
                part[index] = ZERO
        if not changed:
            return
        if number < self._counted_to:
            self._counted_missing -= len(changed)
            if self.missing is not None:
                self.missing -= len(changed)
        first_sector, last_sector = changed[0] // SECTOR_ENTRIES, changed[-1] // SECTOR_ENTRIES
        self.make_dirty(number, range(first_sector, last_sector + 1))

    def make_dirty(self, number: int, sectors: Iterable[int]) -> None:
        """Let the next group write these sectors of a loaded slice."""
        self.dirty.setdefault(number, set()).update(sectors)

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

    def load_now(self, cluster: int) -> None:
        """Bring the slice of a cluster into memory, waiting for the disk (before anybody else uses the map)."""
        number = cluster >> self._shift
        if number not in self._slices:
            view = memoryview(bytearray(self.slice_entries * ENTRY_SIZE))
            if number // self._per_table not in self.unwritten:
                self._check_table(number)
                self._storage.read(self._slice_place(number), view)
            self._keep(number, decode_table(view))

    def check_room(self) -> None:
        """Raise NoMemory if what waits for a commit takes more than all overlays may. A session commits long before."""
        if self._share.is_beyond:
            raise NoMemory(
                f"what a killed mount has left for it takes more than the {format_size(self._share.held_bytes)} of "
                "memory that there is room for"
            )

    def make_slice(self, cluster: int) -> None:
        """Have the slice of `cluster` in memory, if its table is one that the file does not have yet."""
        number = cluster >> self._shift
        if number not in self._slices and number // self._per_table in self.unwritten:
            self._hold_slice(number, empty_table(self.slice_entries))

    # For the commit.

    @property
    def crowded(self) -> bool:
        """Whether slices that wait for a commit take more memory than they should: others cannot go before that."""
        count = len(self.dirty)
        return count > self._dirty_slices or (count > LEAST_SLICES and self._share.is_over)

    def take_dirty(self) -> Dirty:
        """The sectors that a group is about to write, which are not dirty from now on; their slices stay in memory."""
        dirty, self.dirty = self.dirty, {}
        self.pin_slices(dirty)
        return dirty

    def tables_written(self, indices: Iterable[int]) -> None:
        """The file has the L1 entries of these tables."""
        self.unwritten.difference_update(indices)

    def sector(self, number: int, sector: int) -> tuple[int, bytes]:
        """Where one sector of a loaded slice lies in the file, and its bytes now."""
        first = sector * SECTOR_ENTRIES
        data = encode_table(self._slices[number][first : first + SECTOR_ENTRIES])
        return self._slice_place(number) + sector * SECTOR_SIZE, data

    def hold(self, cluster: int) -> None:
        """Keep the slice of a cluster in memory until as many `release` calls."""
        number = cluster >> self._shift
        self._held[number] = self._held.get(number, 0) + 1

    def release(self, cluster: int) -> None:
        """Undo one `hold`."""
        number = cluster >> self._shift
        self._held[number] -= 1
        if not self._held[number]:
            del self._held[number]

    def pin_slices(self, numbers: Iterable[int]) -> None:
        """Keep these slices in memory, beside the dirty ones, until the next call: a group writes them.

        Those that it has written may go now: writes to new tables never come to load any.
        """
        self._pinned = frozenset(numbers)
        self._written |= self._pinned
        self._evict(range(0))

    @property
    def damage(self) -> BadOverlay | None:
        """What the overlay has lost, as far as its tables have been looked at: all of them, once `count` has ended."""
        if self._uncountable is not None:
            return self._uncountable.fresh()
        if not self._cut.lost:
            return None
        return BadOverlay(f"{self._cut.lost} clusters point to where none can be: the file was cut; run qedfs check")

    def begin_reread(self) -> None:
        """A barrier has failed: forget every entry that the file may lack. `load` waits for `end_reread`.

        No entry may be set any more: whoever was about to finds out with the error of the barrier.
        """
        self.epoch += 1
        self._rereading = trio.Event()
        self._share.give(len(self._slices) * self._slice_bytes)
        self._slices.clear()
        self.dirty.clear()
        self._pinned = frozenset()
        self.missing, self._counted_to, self._counted_missing = None, 0, 0

    def end_reread(self, l1: Mapping[int, int]) -> None:
        """Go on with these L1 entries of the tables that were unwritten; without one, its clusters are missing."""
        for index in self.unwritten:
            self.l1[index] = l1.get(index, MISSING)
        self.unwritten.clear()
        if self._rereading is not None:
            self._rereading.set()
            self._rereading = None

    # Counting.

    async def count(self) -> None:
        """Count the missing clusters once; from then on `missing` is kept exact.

        Runs beside readers, writers and others who count: slices below `_counted_to` are kept up to date by `set`.

        Raises:
            BadOverlay: an L1 entry points where no table can be. All other tables have been looked at: what is bad in
                them has to be marked.
        """
        slices = -(-self.geometry.clusters // self.slice_entries)
        for turn in itertools.count():
            if turn % COUNT_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            number = self._counted_to
            if number >= slices:
                break
            try:
                missing = await self.gap(number << self._shift)
                stop = number - (-missing >> self._shift)
                if not missing:
                    part = await self._slice(number)
                    inside = min(self.slice_entries, self.geometry.clusters - (number << self._shift))
                    missing, stop = (part if inside == len(part) else part[:inside]).count(MISSING), number + 1
            except BadOverlay as exc:
                self._uncountable = self._uncountable or exc
                missing, stop = 0, (number // self._per_table + 1) * self._per_table
            if number == self._counted_to:  # else somebody else counts as well, and has counted it
                self._counted_missing += missing
                self._counted_to = stop
        if self._uncountable is not None:
            raise self._uncountable.fresh()
        self.missing = self._counted_missing

    # Inside.

    def _slices_of(self, pos: int, size: int) -> range:
        shift = self._cluster_shift + self._shift
        return range(pos >> shift, ((pos + size - 1) >> shift) + 1)

    def _table_offset(self, number: int) -> int:
        return self.l1[number // self._per_table]

    def _is_blank(self, number: int) -> bool:
        """Whether a slice that is not in memory has no entries: its table is not there, or not yet in the file.

        After a failed barrier the disk tells whether the file has a table, and nobody knows before that has been read.
        """
        index = number // self._per_table
        return not self.l1[index] or (index in self.unwritten and self._rereading is None)

    def _slice_place(self, number: int) -> int:
        return self._table_offset(number) + number % self._per_table * self.slice_entries * ENTRY_SIZE

    def _next_table(self, number: int) -> int:
        """The first slice behind `number` that has a table, or where one look at L1 ends."""
        return self.l1.next_filled(number // self._per_table, GAP_STEPS) * self._per_table

    async def _hole_end(self, number: int) -> int:
        """The first slice from `number` on that may have entries: `number` itself, or one behind it in its table."""
        if self._may_differ(number):
            return number
        self._check_table(number)
        place = self._slice_place(number)
        if self._holes.known(place):
            hole = self._holes.at(place)
        else:
            # In a thread: lseek waits for whoever writes to the file.
            hole = await self._storage.in_thread(lambda: self._holes.at(place))
        rest = self._per_table - number % self._per_table
        stop = number + min(hole // (self.slice_entries * ENTRY_SIZE), rest, GAP_STEPS)
        # Of the slices in the hole and those that may differ, the fewer are looked at: there may be 10^5 holes.
        if len(self._slices) + len(self._written) < stop - number:
            known = itertools.chain(self._slices, self._written)
            return min((n for n in known if number <= n < stop), default=stop)
        return next((n for n in range(number, stop) if self._may_differ(n)), stop)

    def _may_differ(self, number: int) -> bool:
        """Whether a slice may have entries where a hole was seen in the file."""
        return number in self._slices or number in self._written

    async def _load_slice(self, number: int) -> None:
        self._keep(number, await self._read_slice(number))

    def _keep(self, number: int, part: array[int]) -> None:
        """Have a slice in memory that was read; what is bad in it stays bad."""
        if number in self._slices:
            return
        self._hold_slice(number, part)
        if number in self._written:
            return
        self._expect_growth()
        if (bad := self._cut.marked(number, part)) and self._storage.writable:
            self._mark(number, {index // SECTOR_ENTRIES for index in bad})

    def _mark(self, number: int, sectors: Collection[int]) -> None:
        if not self._marks.write(joined([self.sector(number, sector) for sector in sectors])):
            self.make_dirty(number, sectors)  # the slice must be readable on a full disk too

    def _expect_growth(self) -> None:
        """Who looks on while others write to the file finds entries in it beyond the end that it had a moment ago."""
        if not self._storage.locked:
            self._cut.end = max(self._cut.end, self._whole_clusters_end())

    def _whole_clusters_end(self) -> int:
        return round_down(self._storage.size(), self._cluster_size)

    async def _slice(self, number: int) -> array[int]:
        """A slice that has a table; it is brought into memory only if something in it has to be marked."""
        part = self._slices.get(number)
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
        if self._is_blank(number):
            return empty_table(self.slice_entries)
        self._check_table(number)
        view = memoryview(bytearray(self.slice_entries * ENTRY_SIZE))
        offset = self._slice_place(number)
        if not self._storage.read_now(offset, view):
            epoch, first = self.epoch, number << self._shift
            self.hold(first)
            try:
                await self._storage.in_thread(lambda: self._storage.read(offset, view))
            finally:
                self.release(first)
            if epoch != self.epoch:
                return await self._read_slice(number)
        found = self._slices.get(number)
        return decode_table(view) if found is None else found

    def _check_table(self, number: int) -> None:
        table = self._table_offset(number)
        if not valid_table_offset(table, self._header, self.file_end):
            raise BadOverlay(f"the L2 table at {table:#x} is not inside the file; run qedfs check")

    def _evict(self, wanted: range) -> None:
        """Forget slices until the cache is within its bound; `wanted` are about to be used."""
        if not self._too_many():
            return
        for number in list(self._slices):
            if not any(number in needed for needed in (self.dirty, self._pinned, self._held, wanted)):
                del self._slices[number]
                self._share.give(self._slice_bytes)
                if not self._too_many():
                    return

    def _too_many(self) -> bool:
        count = len(self._slices)
        return count > self._cache_slices or (count > LEAST_SLICES and self._share.is_over)

    def _hold_slice(self, number: int, part: array[int]) -> None:
        self._slices[number] = part
        self._share.take(self._slice_bytes)

    def close(self) -> None:
        """Give the memory up: nobody uses the map any more."""
        self._slices.clear()
        self._share.close()
        self._share = Share(Pool(0))  # a read-ahead may still be reading a slice, which is nobody's then

    def checked(self, offset: int, cluster: int) -> int:
        """The data offset of an entry, or BadOverlay if it points where no cluster can be."""
        # Any low bit, an offset inside the header or behind the end: QEMU answers EINVAL, and so must nobody read it.
        if offset & self._cluster_mask or not self._header.area_bytes <= offset < self.file_end:
            raise BadOverlay(f"cluster {cluster} points to {offset:#x}, where no cluster can be; run qedfs check")
        return offset


def _continues(last: Run, offset: int) -> bool:
    # Missing and zero runs have no place: five missing clusters of 64 KiB do not lead to offset 0x50000.
    return last.offset + last.size == offset if last.offset > ZERO else last.offset == offset


def _index(part: array[int], value: int, start: int, stop: int) -> int:
    try:
        return part.index(value, start, stop)
    except ValueError:
        return -1
