"""Checks and repairs the tables of an overlay.

Owns the definition of a corruption, which is the same as in QEMU's check. Leaks are counted as there, but with the
right number of clusters: QEMU divides the length of the file by cluster_size - 1, and so reports leaks that do not
exist. Must not know the record, the journal or the backing. No other program may have the file open. Synchronous. The
time is proportional to the entries that exist, because holes in the tables are skipped.

A part of a table that is one row is compared with the row that it should be (`row_template.py`). Rows in other parts
are found, and judged each as a whole (`table_rows.py`). Scattered clusters are marked as used without a look whether
they are already. If the marks do not add up at the end, all is walked again, entry by entry, to tell which are wrong.

Several processes can share the rest of a walk that turns out to be laborious. Each judges other tables, and what they
have marked is added up. They only find out that all is well: after anything else, one process walks again, alone.

An entry that points to an invalid place can be repaired: it becomes 0, and its clusters read from the backing again, or
as zeros. If two entries refer to one cluster, neither can be repaired, because nothing tells which of them is right.
Leaks only waste space. `give_back_leaks` returns it to the file system: they are cut off at the end of the file, and
punched elsewhere, where they stay leaks.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from array import array
from collections.abc import Callable, Iterator

from qedfs.errors import BadOverlay
from qedfs.format.geometry import ENTRY_SIZE, round_down
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.tables import MISSING, ZERO, decode_table, encode_table
from qedfs.host.shared_work import share_out
from qedfs.overlay.holes import Holes
from qedfs.overlay.row_template import RowTemplate
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_rows import beginnings, is_scattered, looks_scattered, places, rows_at
from qedfs.overlay.used_clusters import MAX_CLUSTERS, MAX_SCATTERED, Marks, UsedClusters, shared_marks

Told = Callable[[int], None]

CHUNK_ENTRIES = 32768  # entries per read, 256 KiB
PIECE_BYTES = 64 << 10  # compared as one number: more does not stay in the processor's cache
TABLES_AHEAD = 8  # that the disk reads meanwhile: more than it takes to keep it busy
PARTS = 64  # of a walk that may be shared
SHARED_FROM = 1 << 19  # entries that no comparison of a whole part was enough for: 50 ms
KEPT_BYTES = 8 << 20
_ZEROS = bytes(CHUNK_ENTRIES * ENTRY_SIZE)
_COUNTS = struct.Struct("<QQQ")  # allocated, zero and tables of a `Report`


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


def check(storage: Storage, header: Header, told: Told = _nobody, *, processes: int = 1) -> Report:
    """Check every entry. Raises BadOverlay if the file is too large to check, and what `storage` raises.

    `told` is called now and then with the end of what is checked, in bytes of the image. More than one of `processes`
    is for a program without threads, see `host/shared_work.py`.
    """
    return _walked(storage, header, told, processes).report


def repair(storage: Storage, header: Header, told: Told = _nobody, *, processes: int = 1) -> Report:
    """Check every entry, and clear those that point to an invalid place.

    Entries only change from "unusable" to "missing", so the order of the writes does not matter. The caller has to make
    these writes durable before it clears NEED_CHECK. `processes` and errors are those of `check`.
    """
    walk = _walked(storage, header, told, processes)
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


def _walked(storage: Storage, header: Header, told: Told, processes: int = 1) -> _Walk:
    """A walk that has ended and changed nothing."""
    _keep_freed_memory()
    if processes > 1 and (shared := _shared_walk(storage, header, told, processes)):
        return shared
    walk = _Walk(storage, header, told, mark_scattered=True)
    if not walk.run():
        walk = _Walk(storage, header, told)
        walk.run()
    return walk


@functools.cache
def _keep_freed_memory() -> None:
    """Tell glibc, once in a process, to keep this much memory: a freed block does (mallopt(3), M_MMAP_THRESHOLD).

    Otherwise the memory for the large numbers of each chunk comes from the kernel and goes back, which takes a third of
    the time of a check.
    """
    bytearray(KEPT_BYTES)


def _shared_walk(storage: Storage, header: Header, told: Told, processes: int) -> _Walk | None:
    """A walk that several processes have shared, if all is well; otherwise None.

    None, too, if the file claims so many clusters that each process would need much memory for its own bits of them.
    """
    whole = _Walk(storage, header, told, mark_scattered=True)
    if (marks := whole.share_marks()) is None:
        return None
    whole.claim_l1()
    done = 0
    while done < PARTS and whole.looked_at < SHARED_FROM:
        whole.part(done)
        done += 1
    here = os.getpid()

    def judged(numbers: Iterator[int]) -> bytes:
        heard = told if os.getpid() == here else _nobody
        walk = _Walk(storage, header, heard, mark_scattered=True, marks=marks)
        for number in numbers:
            walk.part(number)
        return b"" if walk.report.corruptions else walk.encoded()

    results = share_out(range(done, PARTS), processes, judged) if done < PARTS else []
    if whole.report.corruptions or results is None or not all(result and whole.add(result) for result in results):
        return None
    return whole if whole.end() else None


class _Walk:
    def __init__(
        self,
        storage: Storage,
        header: Header,
        told: Told,
        *,
        mend: bool = False,
        mark_scattered: bool = False,
        marks: Marks | None = None,
    ) -> None:
        """`mend`: clear the entries that point to an invalid place. Not together with `mark_scattered`.

        `marks`: that another walk shares, for a walk of a part.
        """
        self._storage = storage
        self._holes = Holes(storage)
        self._holes_ahead = Holes(storage)
        self._header = header
        self._geometry = header.geometry
        self._mend = mend
        self._end = round_down(storage.size(), header.geometry.cluster_size)
        clusters = self._end // header.geometry.cluster_size
        if clusters > MAX_CLUSTERS:
            raise BadOverlay(f"the file claims {clusters} clusters, too many to check")
        self._clusters = clusters
        self._used = UsedClusters(clusters, marks)
        self._template: RowTemplate | None = None
        self._chunk = memoryview(bytearray(min(CHUNK_ENTRIES * ENTRY_SIZE, header.geometry.table_bytes)))
        self.report = Report(total=header.geometry.clusters)
        self.looked_at = 0  # entries of parts that are not one row
        self._told = told
        self._mark_scattered = mark_scattered and clusters <= MAX_SCATTERED
        self._scattered = False  # the last entries that were looked at closely were, and may be marked

    def run(self) -> bool:
        """Walk all. Returns False if scattered clusters are invalid or used twice: then the report is of no use."""
        self.claim_l1()
        self.tables(0, self._geometry.entries)
        return self.end()

    def claim_l1(self) -> None:
        """Before anything else, so that others are told to be wrong if they refer to it."""
        self._claim_table(self._header.l1_table_offset)

    def part(self, number: int) -> None:
        """Judge one of PARTS. The last one has what lies past the image's end, too."""
        used = self._geometry.l1_used
        last = number + 1 == PARTS
        self.tables(number * used // PARTS, self._geometry.entries if last else (number + 1) * used // PARTS)

    def tables(self, first: int, stop: int) -> None:
        """Judge the tables of these L1 entries."""
        for at, chunk in self._filled(self._header.l1_table_offset, first, stop):
            entries = decode_table(chunk)
            bad = [i for i, entry in self._announced(entries) if not self._l1_entry(at + i, entry)]
            self._clear(self._header.l1_table_offset + at * ENTRY_SIZE, entries, bad)

    def end(self) -> bool:
        """Count the leaks, after all tables. Returns what `run` does."""
        header_clusters = self._header.header_size
        self.report.leaks = self._clusters - header_clusters - self._used.count
        return self._used.settle(header_clusters)

    def share_marks(self) -> Marks | None:
        """Marks for walks of parts, which this one has, too. None if there are too many clusters, or no memory."""
        if not self._mark_scattered:
            return None
        try:
            marks = shared_marks(self._clusters)
        except OSError:
            return None
        self._used = UsedClusters(self._clusters, marks)
        return marks

    def encoded(self) -> bytes:
        """What `add` takes."""
        return _COUNTS.pack(self.report.allocated, self.report.zero, self.report.tables) + self._used.encoded()

    def add(self, encoded: bytes) -> bool:
        """Add what a walk of a part has found. Returns False if it refers to a cluster that another one refers to."""
        allocated, zero, tables = _COUNTS.unpack_from(encoded)
        self.report.allocated += allocated
        self.report.zero += zero
        self.report.tables += tables
        return self._used.add(encoded[_COUNTS.size :])

    def unused(self) -> Iterator[tuple[int, int]]:
        """After `run`: (offset, size) of clusters that nothing refers to, neighbours together."""
        cluster_size = self._geometry.cluster_size
        for first, stop in self._used.unused(self._header.header_size, self._end // cluster_size):
            yield first * cluster_size, (stop - first) * cluster_size

    def _filled(self, table: int, first: int, stop: int) -> Iterator[tuple[int, memoryview]]:
        """The chunks of a table that are not all zeros, each with the index of its first entry.

        Each is overwritten by the next one.
        """
        while first < stop:
            offset = table + first * ENTRY_SIZE
            if hole := self._holes.at(offset) // ENTRY_SIZE:
                first += hole
                continue
            chunk = self._chunk[: (stop - first) * ENTRY_SIZE]
            self._storage.read(offset, chunk)
            if not _ZEROS.startswith(chunk):
                yield first, chunk
            first += CHUNK_ENTRIES

    def _announced(self, entries: array[int]) -> Iterator[tuple[int, int]]:
        """The L1 entries that are not MISSING, with their indexes. The disk is told of their tables in advance."""
        found = [(index, entry) for index, entry in enumerate(entries) if entry != MISSING]
        for number, (index, entry) in enumerate(found):
            for _, table in found[number + TABLES_AHEAD if number else 1 : number + TABLES_AHEAD + 1]:
                # What follows the table that is read, without a hole, the kernel reads ahead by itself.
                if self._holes.known(table) or not valid_table_offset(table, self._header, self._end):
                    continue
                if not self._holes_ahead.at(table):
                    self._storage.read_soon(table, len(self._chunk))
            yield index, entry

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
        for first, chunk in self._filled(entry, 0, self._geometry.entries):
            self._told(index * self._geometry.l2_span + first * self._geometry.cluster_size)
            if self._one_row(chunk):
                continue
            for at in range(0, len(chunk), PIECE_BYTES):
                piece = chunk[at : at + PIECE_BYTES]
                if not _ZEROS.startswith(piece) and not self._one_row(piece):
                    self._judge(entry, first + at // ENTRY_SIZE, decode_table(piece))
        return True

    def _one_row(self, chunk: memoryview) -> bool:
        """Judge a part of a table that is one row of data. Returns False, and counts nothing, if it is not."""
        first, last = int.from_bytes(chunk[:ENTRY_SIZE], "little"), int.from_bytes(chunk[-ENTRY_SIZE:], "little")
        count = len(chunk) // ENTRY_SIZE
        if last - first != (count - 1) * self._geometry.cluster_size or not self._is_valid(first, count):
            return False
        if self._template is None:
            self._template = RowTemplate(self._geometry.cluster_size)
        return self._template.fits(chunk, first) and self._row(first, count)

    def _judge(self, table: int, first: int, entries: array[int]) -> None:
        """Judge entries of the table at an offset, of which `first` is the index of the first one."""
        self.looked_at += len(entries)
        if self._scattered and looks_scattered(entries, self._geometry.cluster_size) and self._mark(entries):
            return  # a wrong guess costs time only
        begins = beginnings(entries, self._geometry.cluster_size)
        self._scattered = self._mark_scattered and is_scattered(begins)
        if not (self._scattered and self._mark(entries)):
            self._clear(table + first * ENTRY_SIZE, entries, self._bad_of_rows(first, entries, begins))

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
        if not self._is_valid(entry, count):
            return False
        if not self._used.claim_row(entry // self._geometry.cluster_size, count):
            return False
        self.report.allocated += count
        return True

    def _is_valid(self, offset: int, count: int) -> bool:
        """Whether `count` clusters from an offset on can have data of the image."""
        cluster_size = self._geometry.cluster_size
        return not offset % cluster_size and self._header.area_bytes <= offset <= self._end - count * cluster_size

    def _l2_entry(self, index: int, entry: int) -> bool:
        if not self._is_valid(entry, 1):
            self.report.problem(f"L2 entry {index} points to {entry:#x}, which is not a valid place for a cluster")
            return False
        self.report.allocated += 1
        if not self._used.claim(entry // self._geometry.cluster_size):
            self.report.problem(f"two entries point to the cluster at {entry:#x}")
        return True

    def _claim_table(self, offset: int) -> int:
        """Mark a table's clusters as used. Returns how many of them were used already."""
        return self._used.claim_table(offset // self._geometry.cluster_size, self._geometry.table_size)
