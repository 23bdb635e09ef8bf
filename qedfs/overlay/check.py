"""Checks and repairs the tables of an overlay.

Owns the definition of a corruption, which is the same as in QEMU's check. Leaks are counted as there, but with the
right number of clusters: QEMU divides the length of the file by cluster_size - 1, and so reports leaks that do not
exist. No other program may have the file open. Synchronous. The time is proportional to the entries that exist, because
holes in the tables are skipped.

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
from qedfs.overlay.used_clusters import MAX_CLUSTERS, UsedClusters

# (index, entry) -> whether the entry may stay
_Judge = Callable[[int, int], bool]

CHUNK_ENTRIES = 8192  # entries per read, 64 KiB
_ZEROS = bytes(CHUNK_ENTRIES * ENTRY_SIZE)


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


def check(storage: Storage, header: Header) -> Report:
    """Check every entry. Raises BadOverlay if the file is too large to check, and what `storage` raises."""
    return _Walk(storage, header, mend=False).run()


def repair(storage: Storage, header: Header) -> Report:
    """Check every entry, and clear those that point to an invalid place.

    Entries only change from "unusable" to "missing", so the order of the writes does not matter. The caller has to make
    these writes durable before it clears NEED_CHECK. Raises what `check` raises.
    """
    return _Walk(storage, header, mend=True).run()


def give_back_leaks(storage: Storage, header: Header) -> int:
    """Give the space of leaked clusters back. Returns how many are still leaks: those that are not at the end.

    Only for a sound overlay all of whose tables are durable, without a journal, which may refer to clusters that look
    like leaks. Raises what `check` raises, or BadOverlay if the overlay is not sound.
    """
    walk = _Walk(storage, header, mend=False)
    if walk.run().corruptions:
        raise BadOverlay("is damaged, so nobody knows which clusters are in use")
    leaks = list(walk.unused())
    if leaks and sum(leaks[-1]) >= round_down(storage.size(), header.geometry.cluster_size):
        storage.resize(leaks.pop()[0])
    for offset, size in leaks:
        storage.punch(offset, size)
    storage.barrier()
    return sum(size for _, size in leaks) // header.geometry.cluster_size


class _Walk:
    def __init__(self, storage: Storage, header: Header, *, mend: bool) -> None:
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
        self._chunk = min(CHUNK_ENTRIES, header.geometry.entries)
        # Numbers that are tables of `_chunk` entries: of 1, and of 0, 1, 2, ... clusters.
        self._ones = int.from_bytes(encode_table(array("Q", [1]) * self._chunk), "little")
        steps = array("Q", range(0, self._chunk * header.geometry.cluster_size, header.geometry.cluster_size))
        self._steps = int.from_bytes(encode_table(steps), "little")

    def run(self) -> Report:
        report = self.report
        header_clusters = self._header.header_size
        self._claim_table(self._header.l1_table_offset)
        self._each_entry(self._header.l1_table_offset, self._l1_entry)
        report.leaks = self._end // self._geometry.cluster_size - header_clusters - self._used.count
        return report

    def unused(self) -> Iterator[tuple[int, int]]:
        """After `run`: (offset, size) of clusters that nothing refers to, neighbours together."""
        cluster_size = self._geometry.cluster_size
        for first, stop in self._used.unused(self._header.header_size, self._end // cluster_size):
            yield first * cluster_size, (stop - first) * cluster_size

    def _each_entry(self, table: int, judge: _Judge) -> None:
        """Call `judge(index, entry)` for each entry that is not 0. When repairing, clear those that it rejects."""
        for first, entries in self._filled(table):
            if judge == self._l2_entry and self._all_at_once(entries):
                continue
            bad = [i for i, entry in enumerate(entries) if entry != MISSING and not judge(first + i, entry)]
            if bad and self._mend:
                self._clear(table + first * ENTRY_SIZE, entries, bad)

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
        self._each_entry(entry, self._l2_entry)
        return True

    def _l2_entry(self, index: int, entry: int) -> bool:
        if entry == ZERO:
            self.report.zero += 1
            return True
        cluster_size = self._geometry.cluster_size
        if entry % cluster_size or not self._header.area_bytes <= entry < self._end:
            self.report.problem(f"L2 entry {index} points to {entry:#x}, which is not a valid place for a cluster")
            return False
        self.report.allocated += 1
        if not self._used.claim(entry // cluster_size):
            self.report.problem(f"two entries point to the cluster at {entry:#x}")
        return True

    def _all_at_once(self, entries: array[int]) -> bool:
        """Judge a chunk of an L2 table as a whole, if it is what a stream leaves. Returns whether that was possible.

        That is zero clusters only, or neighbouring clusters in order, which nothing else refers to. A comparison of
        numbers of 64 KiB takes a hundredth of the time that the entries take one by one.
        """
        count, first, cluster_size = len(entries), entries[0], self._geometry.cluster_size
        if count != self._chunk or entries[-1] != (ZERO if first == ZERO else first + (count - 1) * cluster_size):
            return False
        found = int.from_bytes(encode_table(entries), "little")
        if first == ZERO and found == self._ones:
            self.report.zero += count
            return True
        if first % cluster_size or not self._header.area_bytes <= first <= self._end - count * cluster_size:
            return False
        if found != self._steps + first * self._ones or not self._used.claim_row(first // cluster_size, count):
            return False
        self.report.allocated += count
        return True

    def _claim_table(self, offset: int) -> int:
        """Mark a table's clusters as used. Returns how many of them were used already."""
        return self._used.claim_table(offset // self._geometry.cluster_size, self._geometry.table_size)
