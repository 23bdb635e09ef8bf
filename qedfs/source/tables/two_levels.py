"""The L1 and L2 tables of a disk image, read from the source that has the file.

Owns the L1 table, which is in memory, and the cache of L2 tables. Must not know what an L2 entry means beyond what its
`Layout` says, nor what is done with the entries.

L2 tables are cached in slices, so that a look-up in an image with large clusters does not load a table of 2 MiB. Any
number of tasks may look entries up; the rules of what they share are in `cache.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import trio

from qedfs.errors import SourceError
from qedfs.format.sparse import SparseTable
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.source.base import Extent, Identity, Source, layout_mark
from qedfs.source.tables.cache import Cache
from qedfs.source.tables.faults import faults
from qedfs.source.tables.reads import Batch, join, part, read_batch, run_all
from qedfs.units import format_size

SLICE_BYTES = 64 << 10  # of an L2 table: 8192 entries, which map 512 MiB with clusters of 64 KiB
TABLE_CACHE_BYTES = 8 << 20  # maps 64 GiB with such clusters
L1_READ_BYTES = 1 << 20
# How many L2 and L1 entries one call of `extents` examines. Each number takes about 1 ms, which blocks the event loop.
EXTENTS_ENTRIES = 1 << 14
EXTENTS_L1_ENTRIES = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a format lays out its tables. Sizes and offsets in bytes, `*_bits` are binary logarithms.

    `table_bits`: of the entries of an L2 table. `size`: of the disk. `l1_entries`: as many as the disk needs.
    """

    cluster_bits: int
    table_bits: int
    size: int
    l1_offset: int
    l1_entries: int
    decode: Callable[[bytes | bytearray | memoryview], array[int]]  # entries, as they are in the file
    table_offset: Callable[[int], int | None]  # L1 entry -> where its table is; None without one. Raises Fault
    reads_zero: Callable[[int], bool]  # whether an L2 entry is valid and says that its cluster reads as zeros


class _Slice:
    """A part of an L2 table, and where it is in the file."""

    __slots__ = ("number", "offset", "size")

    def __init__(self, number: int, offset: int, size: int) -> None:
        self.number = number
        self.offset = offset
        self.size = size


class TwoLevels:
    """The tables of one image. Made by `load`."""

    def __init__(self, file: Source, name: str, layout: Layout, l1: SparseTable, share: Share, stamp: str) -> None:
        """`share`: the share of the table memory that holds the bytes of `l1`."""
        self.stamp = stamp  # a digest of header and L1 table
        self._file = file
        self._name = name
        self._layout = layout
        self._l1 = l1
        self._l1_share = share
        self._slice_bits = min(layout.table_bits, (SLICE_BYTES // 8).bit_length() - 1)  # entries per slice
        self._tables: Cache[int, array[int]] = Cache(TABLE_CACHE_BYTES, lambda table: 8 * len(table))

    @classmethod
    async def load(cls, file: Source, name: str, layout: Layout, head: bytes) -> Self:
        """Read the L1 table. `name`: of the image, in messages. `head`: the bytes of the header, for the stamp.

        Raises:
            SourceError: there is no memory for the table.
            SourceUnreachable, SourceChanged: as `Source.read`.
        """
        share = Share(memory_pool.TABLES)
        try:
            l1, stamp = await _read_l1(file, name, layout, head, share)
        except BaseException:
            share.close()
            raise
        return cls(file, name, layout, l1, share, stamp)

    async def entries(self, pos: int, size: int, *, urgent: bool) -> list[int]:
        """The L2 entries of the clusters of a range; 0 where there is no table."""
        first = pos >> self._layout.cluster_bits
        last = (pos + size - 1) >> self._layout.cluster_bits
        numbers = range(first >> self._slice_bits, (last >> self._slice_bits) + 1)
        with faults(self._name):
            pieces = {number: piece for number in numbers if (piece := self._slice(number)) is not None}

        async def load(missing: list[int]) -> dict[int, array[int]]:
            return await self._load_slices([pieces[number] for number in missing], urgent=urgent)

        tables = await self._tables.get(pieces, load)
        count = 1 << self._slice_bits
        entries: list[int] = []
        for number in numbers:
            start = max(first - number * count, 0)
            stop = min(last + 1 - number * count, count)
            table = tables.get(number)
            entries += [0] * (stop - start) if table is None else table[start:stop]
        return entries

    def _slice(self, number: int) -> _Slice | None:
        """Where a slice is; None if there is no table. Slices are numbered across the whole disk."""
        slices_bits = self._layout.table_bits - self._slice_bits  # per table
        offset = self._layout.table_offset(self._l1[number >> slices_bits])
        if offset is None:
            return None
        size = 8 << self._slice_bits
        return _Slice(number, offset + (number & ((1 << slices_bits) - 1)) * size, size)

    async def _load_slices(self, pieces: list[_Slice], *, urgent: bool) -> dict[int, array[int]]:
        tables: dict[int, array[int]] = {}

        async def load(batch: Batch[_Slice]) -> None:
            data = await read_batch(self._file, batch, urgent=urgent)
            for piece in batch.pieces:
                tables[piece.number] = self._layout.decode(part(data, batch, piece))

        await run_all([partial(load, batch) for batch in join(pieces)])
        return tables

    async def extents(self, pos: int, size: int) -> Sequence[Extent]:
        """Which parts of the range read as zeros, up to a limit per call. See `Source.extents`."""
        if not size:
            return []
        hole = self._l1_hole(pos)
        if hole > pos:
            return [Extent(pos, min(hole, pos + size) - pos, zero=True)]
        bits, reads_zero = self._layout.cluster_bits, self._layout.reads_zero
        size = min(size, (((pos >> bits) + EXTENTS_ENTRIES) << bits) - pos)
        found: list[Extent] = []
        at, end = pos, pos + size
        for entry in await self.entries(pos, size, urgent=False):
            stop = min(end, ((at >> bits) + 1) << bits)
            zero = reads_zero(entry)
            if found and found[-1].zero == zero:
                first = found.pop().pos
            else:
                first = at
            found.append(Extent(first, stop - first, zero))
            at = stop
        return found

    def _l1_hole(self, pos: int) -> int:
        """The end of the range from `pos` on that has no L2 tables, up to a limit per call; `pos` if it has one."""
        bits = self._layout.cluster_bits + self._layout.table_bits
        first = pos >> bits
        index = self._l1.next_filled(first, EXTENTS_L1_ENTRIES)
        return pos if index == first else min(index << bits, self._layout.size)

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the cached tables say that the range, inside the disk and not empty, reads as zeros."""
        bits, slice_bits, reads_zero = self._layout.cluster_bits, self._slice_bits, self._layout.reads_zero
        cluster, last = pos >> bits, (pos + size - 1) >> bits
        table_bits = self._layout.table_bits
        while cluster <= last:
            if not self._l1[cluster >> table_bits]:
                cluster = ((cluster >> table_bits) + 1) << table_bits
                continue
            table = self._tables.kept(cluster >> slice_bits)
            if table is None:
                return False
            start = cluster & ((1 << slice_bits) - 1)
            cluster += (stop := min(len(table), start + last - cluster + 1)) - start
            if not all(reads_zero(entry) for entry in table[start:stop]):
                return False
        return True

    def close(self) -> None:
        """Give the memory back. Later calls must not ask for entries."""
        self._tables.close()
        self._l1_share.close()


async def _read_l1(file: Source, name: str, layout: Layout, head: bytes, share: Share) -> tuple[SparseTable, str]:
    """Read the L1 table. Also returns a digest of header and table. `share` takes the memory of the table."""
    l1 = SparseTable(layout.l1_entries)
    digest = hashlib.sha256(head)
    piece = memoryview(bytearray(min(L1_READ_BYTES, 8 * layout.l1_entries)))
    for at in range(0, 8 * layout.l1_entries, L1_READ_BYTES):
        data = piece[: 8 * layout.l1_entries - at]
        if not share.fits(len(data)):
            room_bytes = format_size(share.held_bytes)
            raise SourceError(f"backing {name}: its L1 table takes more than the {room_bytes} of memory left for it")
        await file.read(layout.l1_offset + at, data)
        l1.load(at // 8, data, layout.decode)
        share.take(l1.held_bytes - share.held_bytes)
        await trio.to_thread.run_sync(digest.update, data)
    return l1, digest.hexdigest()[:16]


def disk_identity(file: Identity, size: int, kind: str, stamp: str) -> Identity:
    """The version of the disk: its size, and the file's validators, to each of which a mark of the file is added.

    Two versions of a file can have the same virtual size, and an NBD server has no validators. The mark, which is the
    length of the file and a digest of its header and L1 table, takes the place of the date. So it is compared even if
    there is nothing else to compare. If a server without ETags does not send its date any more, that looks like a
    change, which errs on the safe side.
    """
    mark = layout_mark(kind, file.size, stamp)
    etag = None if file.etag is None else f"{file.etag} of {mark}"
    dated = mark if file.last_modified is None else f"{file.last_modified} of {mark}"
    return Identity(size, etag, dated, file.name, file.digest, file.place)
