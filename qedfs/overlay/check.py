"""Checks and repairs the tables of an overlay.

Owns the definition of a corruption, which is the same as in QEMU's check. Leaks are counted as there, but with the
right number of clusters: QEMU divides the length of the file by cluster_size - 1, and so reports leaks that do not
exist. No other program may have the file open. Synchronous. The time is proportional to the entries that exist, because
holes in the tables are skipped.

Clusters in a row are judged together (`table_rows.py`). Scattered ones are marked as used without a look whether they
are already. If the marks do not add up at the end, all is walked again, entry by entry, to tell which are wrong.

An entry that points to an invalid place can be repaired: it becomes 0, and its clusters read from the backing again, or
as zeros. If two entries refer to one cluster, neither can be repaired, because nothing tells which of them is right.
Leaks only waste space. `give_back_leaks` returns it to the file system: they are cut off at the end of the file, and
punched elsewhere, where they stay leaks.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator

from qedfs.errors import BadOverlay
from qedfs.format.geometry import ENTRY_SIZE, round_down
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.tables import MISSING, ZERO, decode_table, encode_table
from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_rows import beginnings, is_scattered, looks_scattered, places, rows_at
from qedfs.overlay.used_clusters import MAX_CLUSTERS, MAX_SCATTERED, UsedClusters

Told = Callable[[int], None]

CHUNK_ENTRIES = 8192  # entries per read, 64 KiB
KEPT_BYTES = 8 << 20
_ZEROS = bytes(CHUNK_ENTRIES * ENTRY_SIZE)


def _nobody(_: int) -> None:
    pass


@dataclasses.dataclass(slots=True)
class Report:
    """The result of a check. `total`, `allocated`, `zero` and `leaks` count clusters, `tables` counts L2 tables.

    `corruptions` and `repaired` count entries, and `corruptions` also each cluster that an L2 table shares.
    """

    total: int  # clusters of the image
    allocated: int = 0
    zero: int = 0
    tables: int = 0
    corruptions: int = 0  # (still) in the file
    repaired: int = 0
    leaks: int = 0
    first_problem: str = ""

    def problem(self, text: str) -> None:
        """Count a corruption. Keeps the description of the first one."""
        self.corruptions += 1
        self.first_problem = self.first_problem or text


def check(storage: Storage, header: Header, told: Told = _nobody) -> Report:
    """Check every entry. Raises BadOverlay if the file is too large to check, and what `storage` raises.

    `told` is called now and then with the end of what is checked, in bytes of the image.
    """
    return _walked(storage, header, told).report


def repair(storage: Storage, header: Header, told: Told = _nobody) -> Report:
    """Check every entry, and clear those that point to an invalid place.

    Entries only change from "unusable" to "missing", so the order of the writes does not matter. The caller has to make
    these writes durable before it clears NEED_CHECK. Raises what `check` raises.
    """
    walk = _walked(storage, header, told)
    if walk.report.corruptions:
        walk = _Walk(storage, header, told, mend=True)
        walk.run()
    return walk.report


def give_back_leaks(storage: Storage, header: Header) -> int:
    """Give the space of leaked clusters back. Returns how many are still leaks: those that are not at the end.

    Only for a sound overlay all of whose tables are durable, without a journal, which may refer to clusters that look
    like leaks. Raises what `check` raises, or BadOverlay if the overlay is not sound.
    """
    walk = _walked(storage, header, _nobody)
    if walk.report.corruptions:
        raise BadOverlay("is damaged, so nobody knows which clusters are in use")
    leaks = list(walk.unused())
    if leaks and sum(leaks[-1]) >= round_down(storage.size(), header.geometry.cluster_size):
        storage.resize(leaks.pop()[0])
    for offset, size in leaks:
        storage.punch(offset, size)
    storage.barrier()
    return sum(size for _, size in leaks) // header.geometry.cluster_size


def _walked(storage: Storage, header: Header, told: Told) -> _Walk:
    """A walk that has ended and changed nothing."""
    # A block that is freed tells glibc to keep as much memory (mallopt(3), M_MMAP_THRESHOLD). Otherwise the memory for
    # the large numbers of each chunk comes from the kernel and goes back, which takes a third of the time of a check.
    bytearray(KEPT_BYTES)
    walk = _Walk(storage, header, told, mark_scattered=True)
    if not walk.run():
        walk = _Walk(storage, header, told)
        walk.run()
    return walk


class _Walk:
    def __init__(
        self, storage: Storage, header: Header, told: Told, *, mend: bool = False, mark_scattered: bool = False
    ) -> None:
        """`mend`: clear the entries that point to an invalid place. Not together with `mark_scattered`."""
        self._storage = storage
        self._holes = Holes(storage)
        self._header = header
        self._geometry = header.geometry
        self._mend = mend
        self._end = round_down(storage.size(), header.geometry.cluster_size)
        clusters = self._end // header.geometry.cluster_size
        if clusters > MAX_CLUSTERS:
            raise BadOverlay(f"the file claims {clusters} clusters, too many to check")
        self._used = UsedClusters(clusters)
        self.report = Report(total=header.geometry.clusters)
        self._told = told
        self._mark_scattered = mark_scattered and clusters <= MAX_SCATTERED
        self._scattered = False  # the last entries that were looked at closely were, and may be marked

    def run(self) -> bool:
        """Returns False if scattered clusters are invalid or used twice, so that the report is of no use."""
        header_clusters = self._header.header_size
        self._claim_table(self._header.l1_table_offset)
        for first, entries in self._filled(self._header.l1_table_offset):
            bad = [i for i, entry in enumerate(entries) if entry != MISSING and not self._l1_entry(first + i, entry)]
            self._clear(self._header.l1_table_offset + first * ENTRY_SIZE, entries, bad)
        self.report.leaks = self._end // self._geometry.cluster_size - header_clusters - self._used.count
        return self._used.settle(header_clusters)

    def unused(self) -> Iterator[tuple[int, int]]:
        """After `run`: (offset, size) of clusters that nothing refers to, neighbours together."""
        cluster_size = self._geometry.cluster_size
        for first, stop in self._used.unused(self._header.header_size, self._end // cluster_size):
            yield first * cluster_size, (stop - first) * cluster_size

    def _filled(self, table: int) -> Iterator[tuple[int, array[int]]]:
        """The chunks of a table that are not all zeros, each with the index of its first entry."""
        first, count = 0, self._geometry.entries
        while first < count:
            offset = table + first * ENTRY_SIZE
            if hole := self._holes.at(offset) // ENTRY_SIZE:
                first += hole
                continue
            data = bytearray(min(CHUNK_ENTRIES, count - first) * ENTRY_SIZE)
            self._storage.read(offset, memoryview(data))
            if not _ZEROS.startswith(data):
                yield first, decode_table(data)
            first += CHUNK_ENTRIES

    def _clear(self, offset: int, entries: array[int], bad: list[int]) -> None:
        """When repairing, clear these entries of the chunk at `offset`."""
        if not bad or not self._mend:
            return
        for index in bad:
            entries[index] = MISSING
        self._storage.write(offset, [encode_table(entries)])
        self.report.corruptions -= len(bad)
        self.report.repaired += len(bad)

    def _l1_entry(self, index: int, entry: int) -> bool:
        if not valid_table_offset(entry, self._header, self._end):
            self.report.problem(f"L1 entry {index} points to {entry:#x}, which is not a valid place for a table")
            return False
        self.report.tables += 1
        shared = self._claim_table(entry)
        if shared:
            for _ in range(shared):
                self.report.problem(f"the L2 table at {entry:#x} shares clusters with something else")
            return True
        for first, entries in self._filled(entry):
            self._told(index * self._geometry.l2_span + first * self._geometry.cluster_size)
            if self._scattered and looks_scattered(entries, self._geometry.cluster_size) and self._mark(entries):
                continue  # a wrong guess costs time only
            begins = beginnings(entries, self._geometry.cluster_size)
            self._scattered = self._mark_scattered and is_scattered(begins)
            if not (self._scattered and self._mark(entries)):
                self._clear(entry + first * ENTRY_SIZE, entries, self._bad_of_rows(first, entries, begins))
        return True

    def _mark(self, entries: array[int]) -> bool:
        """Mark clusters in any order. Whether they are valid is found out at the end; False if they are unaligned."""
        found = places(entries, self._geometry.cluster_size)
        if found is None:
            return False
        clusters, data, zeros = found
        self._used.claim_scattered(clusters, data)
        self.report.allocated += data
        self.report.zero += zeros
        return True

    def _bad_of_rows(self, first: int, entries: array[int], begins: bytes) -> list[int]:
        """Judge the entries of a chunk, of which `first` is the index in the table. Returns the chunk's bad ones."""
        bad = []
        for at, entry, count in rows_at(entries, self._geometry.cluster_size, begins):
            if entry == MISSING or self._row(entry, count):
                continue
            bad += [i for i in range(at, at + count) if not self._l2_entry(first + i, entries[i])]
        return bad

    def _row(self, entry: int, count: int) -> bool:
        """Judge a row as a whole. Returns False, and counts nothing, if something is wrong with it."""
        if entry == ZERO:
            self.report.zero += count
            return True
        cluster_size = self._geometry.cluster_size
        if entry % cluster_size or not self._header.area_bytes <= entry <= self._end - count * cluster_size:
            return False
        if not self._used.claim_row(entry // cluster_size, count):
            return False
        self.report.allocated += count
        return True

    def _l2_entry(self, index: int, entry: int) -> bool:
        cluster_size = self._geometry.cluster_size
        if entry % cluster_size or not self._header.area_bytes <= entry < self._end:
            self.report.problem(f"L2 entry {index} points to {entry:#x}, which is not a valid place for a cluster")
            return False
        self.report.allocated += 1
        if not self._used.claim(entry // cluster_size):
            self.report.problem(f"two entries point to the cluster at {entry:#x}")
        return True

    def _claim_table(self, offset: int) -> int:
        """Mark a table's clusters as used. Returns how many of them were used already."""
        return self._used.claim_table(offset // self._geometry.cluster_size, self._geometry.table_size)
