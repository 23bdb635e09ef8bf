"""Qcow2Source: the virtual disk of a qcow2 image as a read-only source, over the source that has the file.

Owns the order of reads: first L2 tables, then data. Must not know where the file is. `format.py` knows what an entry
means, `plan.py` which reads of the file a request needs.

L2 tables are cached in slices, so that a look-up in an image with large clusters does not load a table of 2 MiB. A read
of a part of a compressed cluster inflates the whole cluster and caches it for reads of its other parts. A read of whole
clusters inflates them into the reader's buffer, and does not cache them.

Concurrency. Any number of tasks may read. They share the two caches, whose rules are in `cache.py`, and no other
mutable state. Clusters are inflated in threads. Urgent reads have their own threads, so that they do not queue behind
background reads. A thread that has started is always waited for, even by a cancelled read, because it may be writing to
the reader's buffer.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import trio

from qedfs.errors import QedfsError, SourceError, SourceUnreachable
from qedfs.format.sparse import SparseTable
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.source.base import LAYOUT, Extent, Identity, Source, check_range
from qedfs.source.qcow2.cache import Cache
from qedfs.source.qcow2.format import (
    HEADER_BYTES,
    Fault,
    Qcow2Header,
    decode_header,
    decode_table,
    has_table,
    reads_zero,
    table_offset,
)
from qedfs.source.qcow2.inflate import Inflate, inflater
from qedfs.source.qcow2.plan import Batch, Compressed, Data, P, join, plan_read
from qedfs.source.zeros import clear
from qedfs.units import format_size

log = logging.getLogger(__name__)

SLICE_BYTES = 64 << 10  # of an L2 table: 8192 entries, which map 512 MiB with clusters of 64 KiB
TABLE_CACHE_BYTES = 8 << 20  # maps 64 GiB with such clusters
CLUSTER_CACHE_BYTES = 16 << 20  # for inflated clusters that were read in part
L1_READ_BYTES = 1 << 20
CONCURRENT_READS = 8  # reads of the file for one request, if its clusters are scattered
# How many L2 and L1 entries one call of `extents` examines. Each number takes about 1 ms, which blocks the event loop.
EXTENTS_ENTRIES = 1 << 14
EXTENTS_L1_ENTRIES = 1 << 14
Job = Callable[[], Awaitable[None]]
T = TypeVar("T")


class _Slice:
    """A part of an L2 table, and where it is in the file."""

    __slots__ = ("number", "offset", "size")

    def __init__(self, number: int, offset: int, size: int) -> None:
        self.number = number
        self.offset = offset
        self.size = size


class Qcow2Source:
    """A `Source` over another one. Create it with `open`. It owns the inner source and closes it."""

    def __init__(
        self,
        inner: Source,
        name: str,
        header: Qcow2Header,
        l1: SparseTable,
        inflate: Inflate,
        stamp: str,
        share: Share,
    ) -> None:
        """`share`: the share of the table memory that holds the bytes of `l1`."""
        self._inner = inner
        self._name = name
        self._header = header
        self._l1 = l1
        self._l1_share = share
        self._inflate = inflate
        self._identity = _identity(inner.identity, header.size, stamp)
        self._closed = False
        self._slice_bits = min(header.table_bits, (SLICE_BYTES // 8).bit_length() - 1)  # entries per slice
        self._tables: Cache[int, array[int]] = Cache(TABLE_CACHE_BYTES, lambda table: 8 * len(table))
        self._clusters: Cache[tuple[int, int], bytes] = Cache(CLUSTER_CACHE_BYTES, len)
        threads = os.cpu_count() or 1
        self._threads = {urgent: trio.CapacityLimiter(threads) for urgent in (False, True)}

    @classmethod
    async def open(cls, inner: Source, name: str) -> Qcow2Source:
        """Read the header and the L1 table. `name` names the image in messages. `inner` stays open on failure.

        Raises:
            SourceError: not a qcow2 image, or one that cannot be served, see `format.py`.
            SourceUnreachable, SourceChanged: as `Source.read`.
        """
        file_size = inner.identity.size
        head = bytearray(min(HEADER_BYTES, file_size))
        await inner.read(0, memoryview(head))
        with _faults(name):
            header = decode_header(bytes(head), file_size)
            inflate = inflater(header.compression)
        if header.corrupt:
            log.info("backing %s is marked as corrupt; it is read as it is, see qemu-img check", name)
        share = Share(memory_pool.TABLES)
        try:
            l1, stamp = await _read_l1(inner, name, header, bytes(head), share)
        except BaseException:
            share.close()
            raise
        return cls(inner, name, header, l1, inflate, stamp, share)

    @property
    def identity(self) -> Identity:
        """The version, see `_identity`."""
        return self._identity

    @property
    def file(self) -> Source:
        """The source of the qcow2 file."""
        return self._inner

    @property
    def compression(self) -> int:
        """The type of compression that the image names: DEFLATE or ZSTD of `format.py`."""
        return self._header.compression

    @property
    def received(self) -> int:
        """Bytes received of the file, including compressed data and tables."""
        return self._inner.received

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> int:
        """Fill `buffer`, see `Source.read`. A damaged table or compressed cluster is a SourceError.

        Returns how many bytes of the file hold the range. Tables are not counted: they are read once.
        """
        view = buffer.cast("B")
        self._check(pos, len(view))
        if not len(view):
            return 0
        entries = await self._entries(pos, len(view), urgent=urgent)
        with _faults(self._name):
            plan = plan_read(self._header, pos, len(view), entries)
        for zeros in plan.zeros:
            clear(view[zeros.at : zeros.at + zeros.size])
        parts = [piece for piece in plan.compressed if not piece.whole]
        pieces: list[Data | Compressed] = [*plan.data, *(piece for piece in plan.compressed if piece.whole)]
        jobs: list[Job] = [partial(self._copy_part, piece, view, urgent=urgent) for piece in parts]
        batches = join(pieces)
        jobs += [partial(self._read_batch, batch, view, urgent=urgent) for batch in batches]
        await _run(jobs)
        return sum(batch.size for batch in batches) + sum(piece.size for piece in parts)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the range are unallocated or zero, up to a limit per call. See `Source.extents`."""
        self._check(pos, size)
        if not size:
            return []
        hole = self._l1_hole(pos)
        if hole > pos:
            return [Extent(pos, min(hole, pos + size) - pos, zero=True)]
        bits = self._header.cluster_bits
        size = min(size, (((pos >> bits) + EXTENTS_ENTRIES) << bits) - pos)
        found: list[Extent] = []
        at, end = pos, pos + size
        for entry in await self._entries(pos, size, urgent=False):
            stop = min(end, ((at >> bits) + 1) << bits)
            zero = reads_zero(self._header, entry)
            if found and found[-1].zero == zero:
                first = found.pop().pos
            else:
                first = at
            found.append(Extent(first, stop - first, zero))
            at = stop
        return found

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the cached tables say that the range reads as zeros, see `KnowsZeros`."""
        end = pos + size
        if self._closed or size <= 0 or pos < 0 or end > self._header.size:
            return False
        bits, slice_bits = self._header.cluster_bits, self._slice_bits
        cluster, last = pos >> bits, (end - 1) >> bits
        table_bits = self._header.table_bits
        while cluster <= last:
            if not has_table(self._l1[cluster >> table_bits]):
                cluster = ((cluster >> table_bits) + 1) << table_bits
                continue
            table = self._tables.kept(cluster >> slice_bits)
            if table is None:
                return False
            start = cluster & ((1 << slice_bits) - 1)
            cluster += (stop := min(len(table), start + last - cluster + 1)) - start
            if not all(reads_zero(self._header, entry) for entry in table[start:stop]):
                return False
        return True

    async def aclose(self) -> None:
        """Close the file's source. Later reads raise SourceUnreachable."""
        self._closed = True
        for holder in (self._tables, self._clusters, self._l1_share):
            holder.close()
        await self._inner.aclose()

    def _check(self, pos: int, size: int) -> None:
        check_range(pos, size, self._header.size)
        if self._closed:
            raise SourceUnreachable(f"backing {self._name}: closed")

    # Tables.

    async def _entries(self, pos: int, size: int, *, urgent: bool) -> list[int]:
        """The L2 entries of the clusters of a range; 0 (unallocated) where there is no table."""
        first = pos >> self._header.cluster_bits
        last = (pos + size - 1) >> self._header.cluster_bits
        numbers = range(first >> self._slice_bits, (last >> self._slice_bits) + 1)
        with _faults(self._name):
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
        """Where a slice is; None if its table is unallocated. Slices are numbered across the whole disk."""
        slices_bits = self._header.table_bits - self._slice_bits  # per table
        offset = table_offset(self._header, self._l1[number >> slices_bits])
        if offset is None:
            return None
        size = 8 << self._slice_bits
        return _Slice(number, offset + (number & ((1 << slices_bits) - 1)) * size, size)

    async def _load_slices(self, pieces: list[_Slice], *, urgent: bool) -> dict[int, array[int]]:
        tables: dict[int, array[int]] = {}

        async def load(batch: Batch[_Slice]) -> None:
            data = await self._read_file(batch, urgent=urgent)
            for piece in batch.pieces:
                tables[piece.number] = decode_table(_part(data, batch, piece))

        await _run([partial(load, batch) for batch in join(pieces)])
        return tables

    def _l1_hole(self, pos: int) -> int:
        """The end of the range from `pos` on that has no L2 tables, up to a limit per call; `pos` if it has one."""
        bits = self._header.cluster_bits + self._header.table_bits
        first = pos >> bits
        index = self._l1.next_filled(first, EXTENTS_L1_ENTRIES)
        return pos if index == first else min(index << bits, self._header.size)

    # Clusters.

    async def _read_batch(self, batch: Batch[Data | Compressed], view: memoryview, *, urgent: bool) -> None:
        """Read a batch from the file, and put its pieces into the reader's buffer."""
        piece = batch.pieces[0]
        if len(batch.pieces) == 1 and isinstance(piece, Data):
            await self._inner.read(piece.offset, view[piece.at : piece.at + piece.size], urgent=urgent)
            return
        data = await self._read_file(batch, urgent=urgent)
        compressed = False
        for piece in batch.pieces:
            if isinstance(piece, Data):
                view[piece.at : piece.at + piece.size] = _part(data, batch, piece)
            else:
                compressed = True
        if compressed:
            with _faults(self._name):
                await self._in_thread(partial(self._inflate_batch, batch, data, view), urgent=urgent)

    def _inflate_batch(self, batch: Batch[Data | Compressed], data: memoryview, view: memoryview) -> None:
        for piece in batch.pieces:
            if isinstance(piece, Compressed):
                plain = self._inflate(_part(data, batch, piece), self._header.cluster_size)
                view[piece.at : piece.at + piece.want] = memoryview(plain)[: piece.want]

    async def _copy_part(self, piece: Compressed, view: memoryview, *, urgent: bool) -> None:
        """Fill a part of the buffer from a compressed cluster. Cache the cluster, since its other parts will follow."""
        key = piece.offset, piece.size

        async def load(_: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
            data = await self._read_file(Batch(piece.offset, piece.size, [piece]), urgent=urgent)
            with _faults(self._name):
                inflate = partial(self._inflate, data, self._header.cluster_size)
                return {key: await self._in_thread(inflate, urgent=urgent)}

        plain = (await self._clusters.get([key], load))[key]
        view[piece.at : piece.at + piece.want] = memoryview(plain)[piece.skip : piece.skip + piece.want]

    async def _read_file(self, batch: Batch[P], *, urgent: bool) -> memoryview:
        data = memoryview(bytearray(batch.size))
        await self._inner.read(batch.offset, data, urgent=urgent)
        return data

    async def _in_thread(self, function: Callable[[], T], *, urgent: bool) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._threads[urgent])


def _part(data: memoryview, batch: Batch[P], piece: P) -> memoryview:
    start = piece.offset - batch.offset
    return data[start : start + piece.size]


async def _read_l1(inner: Source, name: str, header: Qcow2Header, head: bytes, share: Share) -> tuple[SparseTable, str]:
    """Read the L1 table. Also returns a digest of header and table. `share` takes the memory of the table."""
    l1 = SparseTable(header.l1_entries)
    digest = hashlib.sha256(head)
    piece = memoryview(bytearray(min(L1_READ_BYTES, 8 * header.l1_entries)))
    for at in range(0, 8 * header.l1_entries, L1_READ_BYTES):
        data = piece[: 8 * header.l1_entries - at]
        if not share.fits(len(data)):
            room_bytes = format_size(share.held_bytes)
            raise SourceError(f"backing {name}: its L1 table takes more than the {room_bytes} of memory left for it")
        await inner.read(header.l1_offset + at, data)
        l1.load(at // 8, data, decode_table)
        share.take(l1.held_bytes - share.held_bytes)
        await trio.to_thread.run_sync(digest.update, data)
    return l1, digest.hexdigest()[:16]


def _identity(inner: Identity, size: int, stamp: str) -> Identity:
    """The version of the disk: its size, and the file's validators, to each of which a mark of the file is added.

    Two versions of a file can have the same virtual size, and an NBD server has no validators. The mark, which is the
    length of the file and a digest of its header and L1 table, takes the place of the date. So it is compared even if
    there is nothing else to compare. If a server without ETags sends a date only now and then, that looks like a
    change, which errs on the safe side.
    """
    mark = f"{LAYOUT}{inner.size} bytes, tables {stamp}"
    etag = None if inner.etag is None else f"{inner.etag} of {mark}"
    dated = mark if inner.last_modified is None else f"{inner.last_modified} of {mark}"
    return Identity(size, etag, dated, inner.name, inner.digest, inner.place)


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Turn a fault of the image into an error that names the image."""
    try:
        yield
    except Fault as exc:
        raise SourceError(f"backing {name} {exc}") from exc


async def _run(jobs: Sequence[Job]) -> None:
    """Run all jobs, a few at a time. The first QedfsError cancels the others and is raised, not in a group."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    failures: list[QedfsError] = []
    rest = iter(jobs)
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            for job in rest:
                try:
                    await job()
                except QedfsError as exc:
                    failures.append(exc)
                    nursery.cancel_scope.cancel()
                    return

        for _ in range(min(CONCURRENT_READS, len(jobs))):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
