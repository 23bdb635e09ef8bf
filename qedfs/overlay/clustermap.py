"""The cluster map: where each cluster of the image is, and which are missing. Includes uncommitted entries.

Owns the meaning of an entry. `table_slices.py` has the tables with the entries, `missing_count.py` the count of missing
clusters. Must not know who changes an entry, nor why.

Changes happen on the event loop between two awaits, so a look-up never sees a partial change. Only `load`, `gap`,
`seek` and `next_missing` await. After them, the caller must repeat any look-up that it made before.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import trio

from qedfs.errors import BadOverlay
from qedfs.format.geometry import ENTRY_SIZE, Geometry
from qedfs.format.header import Header
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.missing_count import MissingCount
from qedfs.overlay.sectors import SECTOR_ENTRIES
from qedfs.overlay.table_rows import Row, rows
from qedfs.overlay.table_search import next_data, next_hole
from qedfs.overlay.table_slices import TableSlices

Freed = dict[tuple[int, int], list[int]]  # (slice, sector) -> offsets of data that its entries referred to

COUNT_AT_ONCE = 32  # slices or holes to examine before other tasks get their turn


class Run(NamedTuple):
    """Neighbouring clusters in the same state, clipped to the request.

    `offset`: for data, where the bytes at `pos` are in the overlay file; otherwise MISSING or ZERO. `size` in bytes.
    """

    offset: int
    pos: int
    size: int


class ClusterMap:
    """The map of one overlay."""

    def __init__(self, tables: TableSlices, header: Header) -> None:
        geometry = header.geometry
        self.geometry = geometry
        self.slice_entries = tables.slice_entries  # clusters that one slice maps
        self._tables = tables
        self._slices = tables.slices  # the same dictionary, to save an attribute look-up on the read path
        self._first_byte = header.area_bytes  # the lowest valid offset of a cluster
        self.discarded = 0  # how many missing clusters were discarded
        self.missing_count = MissingCount(tables, geometry, self.gap)
        self._count_less = self.missing_count.less
        self._shift = self.slice_entries.bit_length() - 1
        self._mask = self.slice_entries - 1
        self._cluster_size = geometry.cluster_size
        self._cluster_shift = geometry.cluster_size.bit_length() - 1
        self._cluster_mask = geometry.cluster_size - 1

    # Look-ups: synchronous, on the read path.

    def data_offset(self, pos: int, size: int) -> int:
        """Where the bytes of a request are in the file, if they are data in one piece; 0 for any other request."""
        start = pos & self._cluster_mask
        if start + size > self._cluster_size:
            return self._data_offset(pos, size)
        cluster = pos >> self._cluster_shift
        part = self._slices.get(cluster >> self._shift)
        if part is None:
            return 0
        offset = part[cluster & self._mask]
        return self.checked(offset, cluster) + start if offset > ZERO else 0

    def _data_offset(self, pos: int, size: int) -> int:
        """As `data_offset`, for several clusters of one slice. 2 us for 1 MiB of 64 KiB clusters."""
        first, last = pos >> self._cluster_shift, (pos + size - 1) >> self._cluster_shift
        number = first >> self._shift
        part = self._slices.get(number)
        if part is None or last >> self._shift != number:
            return 0
        index = first & self._mask
        offset = expected = part[index]
        for entry in part[index : index + last - first + 1]:
            if entry != expected:
                return 0
            expected += self._cluster_size
        if offset <= ZERO:
            return 0
        self.checked(expected - self._cluster_size, last)
        return self.checked(offset, first) + (pos & self._cluster_mask)

    def checked(self, offset: int, cluster: int) -> int:
        """The data offset of an entry. Raises BadOverlay if it points to an invalid place."""
        # Unaligned, inside the header, or past the end. QEMU returns EINVAL, and nothing may be read from there.
        if offset & self._cluster_mask or not self._first_byte <= offset < self._tables.file_end:
            raise BadOverlay(f"cluster {cluster} points to {offset:#x}, which is not a valid place; run qedfs check")
        return offset

    def entry(self, cluster: int) -> int:
        """The entry of a cluster whose slice is loaded."""
        number = cluster >> self._shift
        part = self._slices.get(number)
        if part is None:
            if not self._tables.is_blank(number):
                raise LookupError(cluster)
            return MISSING
        return part[cluster & self._mask]

    def runs(self, pos: int, size: int) -> list[Run] | None:
        """Split a request into runs; None if a slice has to be loaded first (`load`).

        Raises:
            BadOverlay: an entry points to an invalid place.
        """
        if (pos & self._cluster_mask) + size <= self._cluster_size and size:
            return self._run_in_cluster(pos, size)
        runs: list[Run] = []
        end = pos + size
        while pos < end:
            cluster = pos >> self._cluster_shift
            found = self._rows(cluster, (end - 1 >> self._cluster_shift) + 1 - cluster)
            if found is None:
                return None
            start = pos & self._cluster_mask
            for _, entry, count in found:
                length = min((count << self._cluster_shift) - start, end - pos)
                if entry > ZERO:
                    if count > 1:
                        self.checked(entry + (count - 1 << self._cluster_shift), cluster + count - 1)
                    offset = self.checked(entry, cluster) + start
                else:
                    offset = entry
                if runs and _continues(runs[-1], offset):
                    last = runs[-1]
                    runs[-1] = Run(last.offset, last.pos, last.size + length)
                else:
                    runs.append(Run(offset, pos, length))
                pos += length
                cluster += count
                start = 0
        return runs

    def _run_in_cluster(self, pos: int, size: int) -> list[Run] | None:
        """As `runs`, for a part of one cluster. 0.7 us, while `rows` takes another 0.7."""
        cluster = pos >> self._cluster_shift
        part = self._slices.get(cluster >> self._shift)
        if part is None:
            return [Run(MISSING, pos, size)] if self._tables.is_blank(cluster >> self._shift) else None
        entry = part[cluster & self._mask]
        offset = self.checked(entry, cluster) + (pos & self._cluster_mask) if entry > ZERO else entry
        return [Run(offset, pos, size)]

    def _rows(self, cluster: int, count: int) -> list[Row] | None:
        """The rows of these clusters, up to the end of their slice at most; None if that is not loaded."""
        number, index = cluster >> self._shift, cluster & self._mask
        count = min(count, self.slice_entries - index)
        part = self._slices.get(number)
        if part is not None:
            return rows(part[index : index + count], self._cluster_size)
        return [(0, MISSING, count)] if self._tables.is_blank(number) else None

    def is_loaded(self, pos: int, size: int) -> bool:
        """Whether `runs` can answer this request without a `load`."""
        return all(map(self._tables.is_loaded, self._slices_of(pos, size)))

    async def load(self, pos: int, size: int) -> None:
        """Load the slices of a request into the cache.

        Raises:
            BadOverlay: an L1 entry points to an invalid place.
        """
        await self._tables.load(self._slices_of(pos, size))

    def _slices_of(self, pos: int, size: int) -> range:
        shift = self._cluster_shift + self._shift
        return range(pos >> shift, ((pos + size - 1) >> shift) + 1)

    async def next_missing(self, cluster: int, most: int) -> tuple[int, int] | None:
        """The first run of missing clusters at or after `cluster`: (first, count), at most `most` clusters long.

        A range without an L2 table costs one step, however large it is. None if no cluster is missing.
        """
        clusters = self.geometry.clusters
        full = 0
        while cluster < clusters:
            number = cluster >> self._shift
            limit = min((number + 1) << self._shift, clusters)
            if not self._tables.table_offset(number):
                return cluster, min(most, limit - cluster)
            if number not in self._slices:
                await self._tables.load_slice(number)
                continue
            part = self._slices[number]
            at = _index(part, MISSING, cluster & self._mask, limit - (number << self._shift))
            if at < 0:
                cluster, full = limit, full + 1
                if full % COUNT_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                continue
            cluster = (number << self._shift) + at
            _, _, count = rows(part[at : at + min(most, limit - cluster)], self._cluster_size)[0]
            return cluster, count
        return None

    async def seek(self, cluster: int, stop: int, *, hole: bool, missing_is_hole: bool) -> int:
        """The first cluster from `cluster` on that is in a hole (or not in one); `stop` if none is before it.

        A hole is a zero cluster and, with `missing_is_hole`, a missing one. A range without an L2 table costs one step.

        Raises:
            BadOverlay: an L1 entry points to an invalid place.
        """
        for turn in itertools.count(1):
            if cluster >= stop:
                break
            if turn % COUNT_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if missing := await self.gap(cluster):
                if hole == missing_is_hole:
                    return cluster
                cluster += missing
                continue
            number = cluster >> self._shift
            part = await self._tables.entries(number)
            first = number << self._shift
            end = min(self.slice_entries, stop - first)
            search = next_hole if hole else next_data
            cluster = first + search(part, cluster - first, end, missing_is_hole=missing_is_hole)
            if cluster < first + end:
                return cluster
        return stop

    async def gap(self, cluster: int) -> int:
        """How many clusters from here on are missing because there is no table, or only a hole of the file in it.

        0 means that the entries have to be examined. After the end of a gap there may be another one.

        Raises:
            BadOverlay: the L1 entry points to an invalid place.
        """
        number = cluster >> self._shift
        tables = self._tables
        stop = await tables.hole_end(number) if tables.table_offset(number) else tables.next_table(number)
        return max(0, min(stop << self._shift, self.geometry.clusters) - cluster)

    def all_missing(self, cluster: int, count: int) -> bool:
        """Whether none of these clusters has an entry. False if the cache cannot tell."""
        try:
            return len(self.missing_of(cluster, count)) == count
        except LookupError:
            return False

    def missing_of(self, cluster: int, count: int) -> Sequence[int]:
        """Those of these clusters that are missing. Their slices are loaded, or have no entries."""
        found: list[int] = []
        end = cluster + count
        while cluster < end:
            number, index = cluster >> self._shift, cluster & self._mask
            stop = min(end, cluster - index + self.slice_entries)
            part = self._slices.get(number)
            if part is not None:
                entries = part[index : index + stop - cluster]
                found += [at for at, entry in enumerate(entries, cluster) if entry == MISSING]
            elif self._tables.is_blank(number):
                found += range(cluster, stop)
            else:
                raise LookupError(cluster)
            cluster = stop
        return found

    def one_of_each_slice(self, clusters: Iterable[int]) -> Collection[int]:
        """One of these clusters for each slice that has some of them."""
        return {cluster >> self._shift: cluster for cluster in clusters}.values()

    def count_missing_in(self, cluster: int, count: int) -> int:
        """How many of these clusters are missing, or are in a slice that is not loaded."""
        missing, end = 0, cluster + count
        while cluster < end:
            number, index = cluster >> self._shift, cluster & self._mask
            length = min(end - cluster, self.slice_entries - index)
            part = self._slices.get(number)
            missing += length if part is None else part[index : index + length].count(MISSING)
            cluster += length
        return missing

    def has_table(self, cluster: int) -> bool:
        """Whether there is an L2 table for this cluster."""
        return self._tables.needs_table(cluster) is None

    @property
    def epoch(self) -> int:
        """How many times entries were taken back, after a failed barrier."""
        return self._tables.epoch

    # Changes: synchronous, on the event loop.

    def set(self, cluster: int, entry: int) -> None:
        """Set the entry of `cluster` in memory. A commit writes it to the file.

        The table must exist, and the slice be loaded (`needs_table`, `load`).
        """
        number = cluster >> self._shift
        part = self._slices[number]
        index = cluster & self._mask
        if part[index] == MISSING:
            self._count_less(number, 1)
        part[index] = entry
        self._tables.make_dirty(number, {index // SECTOR_ENTRIES})

    def set_all(self, entries: Sequence[tuple[int, int]]) -> None:
        """As `set`, for several (cluster, entry). Takes 0.2 us for each if they are in one slice."""
        if len(entries) == 1:
            self.set(*entries[0])
            return
        mask = self._mask
        for first in self.one_of_each_slice(cluster for cluster, _ in entries):
            number = first >> self._shift
            part = self._slices[number]
            missing, sectors = 0, set[int]()
            for cluster, entry in entries:
                if cluster >> self._shift == number:
                    index = cluster & mask
                    missing += part[index] == MISSING
                    part[index] = entry
                    sectors.add(index // SECTOR_ENTRIES)
            self._count_less(number, missing)
            self._tables.make_dirty(number, sectors)

    def set_zeros(self, first: int, count: int) -> None:
        """Set the missing ones among `count` clusters to ZERO. Takes 10 us for 2048 clusters that are all missing."""
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
        self._count_less(number, len(changed))
        first_sector, last_sector = changed[0] // SECTOR_ENTRIES, changed[-1] // SECTOR_ENTRIES
        self._tables.make_dirty(number, range(first_sector, last_sector + 1))

    def first_discardable(self, first: int, count: int, *, missing_too: bool) -> int:
        """The first of these clusters that `discard` would change, or the end of them.

        Their slices are loaded, or have no entries.
        """
        stop = first + count
        while first < stop:
            number, start = first >> self._shift, first & self._mask
            end = min(self.slice_entries, start + stop - first)
            part = self._slices.get(number)
            found = end
            if part is not None:
                found = next_data(part, start, end, missing_is_hole=not missing_too)
            elif missing_too:
                found = start
            first += found - start
            if found < end:
                break
        return first

    def discard(self, first: int, count: int, *, missing_too: bool) -> tuple[Freed, int]:
        """Set `count` clusters to ZERO, without `missing_too` only those with data. Their slices are in memory.

        Returns the offsets of the data that no entry refers to any more, and how many clusters were missing.
        """
        freed: Freed = {}
        missing = 0
        stop = first + count
        while first < stop:
            number, start = first >> self._shift, first & self._mask
            end = min(self.slice_entries, start + stop - first)
            first += end - start
            # Without `missing_too`, a table need not exist.
            if (part := self._slices.get(number)) is not None:
                missing += self._discard_of(number, part, start, end, freed, missing_too=missing_too)
        self.discarded += missing
        return freed, missing

    def _discard_of(
        self, number: int, part: array[int], start: int, end: int, freed: Freed, *, missing_too: bool
    ) -> int:
        entries = part[start:end]
        missing = entries.count(MISSING) if missing_too else 0
        data = [(index, entry) for index, entry in enumerate(entries, start) if entry > ZERO]
        if not data and not missing:
            return 0
        if missing_too:
            part[start:end] = array("Q", (ZERO,)) * (end - start)
        else:
            for index, entry in enumerate(entries, start):
                part[index] = min(entry, ZERO)
        self._count_less(number, missing)
        self._tables.make_dirty(number, range(start // SECTOR_ENTRIES, (end - 1) // SECTOR_ENTRIES + 1))
        for index, offset in data:
            # Others point to invalid places.
            if not offset & self._cluster_mask and self._first_byte <= offset < self._tables.file_end:
                freed.setdefault((number, index // SECTOR_ENTRIES), []).append(offset)
        return missing

    def move(self, cluster: int, offset: int, freed: Freed) -> None:
        """Let the entry of a cluster with data point to a copy at `offset`. Adds the old place to `freed`."""
        number, index = cluster >> self._shift, cluster & self._mask
        freed.setdefault((number, index // SECTOR_ENTRIES), []).append(self._slices[number][index])
        self.set(cluster, offset)

    def drop(self, clusters: Iterable[int], freed: Freed) -> None:
        """Let those of these clusters that have an entry be missing again. Adds their old places to `freed`."""
        for cluster in clusters:
            number, index = cluster >> self._shift, cluster & self._mask
            part = self._slices[number]
            if part[index] > ZERO:
                freed.setdefault((number, index // SECTOR_ENTRIES), []).append(part[index])
            if part[index] != MISSING:
                part[index] = MISSING
                self._count_less(number, -1)
                self._tables.make_dirty(number, {index // SECTOR_ENTRIES})

    def data_in(self, cluster: int, count: int) -> list[int]:
        """Those of these clusters that have data. Their slices are loaded, or have no entries."""
        return [number for number in range(cluster, cluster + count) if self.entry(number) > ZERO]

    def hold(self, cluster: int) -> None:
        """Keep the slice of a cluster in memory until as many `release` calls."""
        self._tables.hold(cluster >> self._shift)

    def release(self, cluster: int) -> None:
        """Undo one `hold`."""
        self._tables.release(cluster >> self._shift)

    def load_now(self, cluster: int) -> None:
        """Load the slice of a cluster, waiting for the disk. Only before anybody else uses the map."""
        self._tables.load_now(cluster >> self._shift)

    def grow(self, geometry: Geometry) -> None:
        """Let the image be larger. The slice of its last cluster so far is in memory, or has no entries."""
        self.geometry = geometry
        self.missing_count.grow(geometry)


def _continues(last: Run, offset: int) -> bool:
    # Missing and zero runs have no offset that would advance from cluster to cluster.
    return last.offset + last.size == offset if last.offset > ZERO else last.offset == offset


def _index(part: array[int], value: int, start: int, stop: int) -> int:
    try:
        return part.index(value, start, stop)
    except ValueError:
        return -1
