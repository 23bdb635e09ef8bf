"""Qcow2Source: the virtual disk of a qcow2 image as a read-only source, over the source that has the file.

Owns the order of reads: first L2 tables, then data. Must not know where the file is. `format.py` knows what an entry
means, `plan.py` which pieces of the file a request needs.

A read of a part of a compressed cluster inflates the whole cluster and caches it for reads of its other parts. A read
of whole clusters inflates them into the reader's buffer, and does not cache them.

Concurrency. Any number of tasks may read. They share two caches, of tables (`tables/two_levels.py`) and of clusters,
whose rules are in `tables/cache.py`, and no other mutable state. Clusters are inflated in threads. Urgent reads have
their own threads, so that they do not queue behind background reads. A thread that has started is always waited for,
even by a cancelled read, because it may be writing to the reader's buffer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.base import Extent, Identity, Source, check_range
from qedfs.source.qcow2.format import HEADER_BYTES, Qcow2Header, decode_header, decode_table, reads_zero, table_offset
from qedfs.source.qcow2.inflate import Inflate, inflater
from qedfs.source.qcow2.plan import Compressed, plan_read
from qedfs.source.tables.cache import Cache
from qedfs.source.tables.faults import faults
from qedfs.source.tables.reads import Batch, Data, Job, join, part, read_batch, run_all
from qedfs.source.tables.two_levels import Layout, TwoLevels, disk_identity
from qedfs.source.zeros import clear

log = logging.getLogger(__name__)

CLUSTER_CACHE_BYTES = 16 << 20  # for inflated clusters that were read in part
T = TypeVar("T")


class Qcow2Source:
    """A `Source` over another one. Create it with `open`. It owns the inner source and closes it."""

    def __init__(self, inner: Source, name: str, header: Qcow2Header, tables: TwoLevels, inflate: Inflate) -> None:
        self._inner = inner
        self._name = name
        self._header = header
        self._tables = tables
        self._inflate = inflate
        self._identity = disk_identity(inner.identity, header.size, "qcow2", tables.stamp)
        self._closed = False
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
        with faults(name):
            header = decode_header(bytes(head), file_size)
            inflate = inflater(header.compression)
        if header.corrupt:
            log.info("backing %s is marked as corrupt; it is read as it is, see qemu-img check", name)
        return cls(inner, name, header, await TwoLevels.load(inner, name, _layout(header), bytes(head)), inflate)

    @property
    def identity(self) -> Identity:
        """The version, see `disk_identity`."""
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
        entries = await self._tables.entries(pos, len(view), urgent=urgent)
        with faults(self._name):
            plan = plan_read(self._header, pos, len(view), entries)
        for zeros in plan.zeros:
            clear(view[zeros.at : zeros.at + zeros.size])
        parts = [piece for piece in plan.compressed if not piece.whole]
        pieces: list[Data | Compressed] = [*plan.data, *(piece for piece in plan.compressed if piece.whole)]
        jobs: list[Job] = [partial(self._copy_part, piece, view, urgent=urgent) for piece in parts]
        batches = join(pieces)
        jobs += [partial(self._read_batch, batch, view, urgent=urgent) for batch in batches]
        await run_all(jobs)
        return sum(batch.size for batch in batches) + sum(piece.size for piece in parts)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the range are unallocated or zero, up to a limit per call. See `Source.extents`."""
        self._check(pos, size)
        return await self._tables.extents(pos, size)

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the cached tables say that the range reads as zeros, see `KnowsZeros`."""
        if self._closed or size <= 0 or pos < 0 or pos + size > self._header.size:
            return False
        return self._tables.zeros_now(pos, size)

    async def aclose(self) -> None:
        """Close the file's source. Later reads raise SourceUnreachable."""
        self._closed = True
        self._tables.close()
        self._clusters.close()
        await self._inner.aclose()

    def _check(self, pos: int, size: int) -> None:
        check_range(pos, size, self._header.size)
        if self._closed:
            raise SourceUnreachable(f"backing {self._name}: closed")

    # Clusters.

    async def _read_batch(self, batch: Batch[Data | Compressed], view: memoryview, *, urgent: bool) -> None:
        """Read a batch from the file, and put its pieces into the reader's buffer."""
        piece = batch.pieces[0]
        if len(batch.pieces) == 1 and isinstance(piece, Data):
            await self._inner.read(piece.offset, view[piece.at : piece.at + piece.size], urgent=urgent)
            return
        data = await read_batch(self._inner, batch, urgent=urgent)
        compressed = False
        for piece in batch.pieces:
            if isinstance(piece, Data):
                view[piece.at : piece.at + piece.size] = part(data, batch, piece)
            else:
                compressed = True
        if compressed:
            with faults(self._name):
                await self._in_thread(partial(self._inflate_batch, batch, data, view), urgent=urgent)

    def _inflate_batch(self, batch: Batch[Data | Compressed], data: memoryview, view: memoryview) -> None:
        for piece in batch.pieces:
            if isinstance(piece, Compressed):
                plain = self._inflate(part(data, batch, piece), self._header.cluster_size)
                view[piece.at : piece.at + piece.want] = memoryview(plain)[: piece.want]

    async def _copy_part(self, piece: Compressed, view: memoryview, *, urgent: bool) -> None:
        """Fill a part of the buffer from a compressed cluster. Cache the cluster, since its other parts will follow."""
        key = piece.offset, piece.size

        async def load(_: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
            data = await read_batch(self._inner, Batch(piece.offset, piece.size, [piece]), urgent=urgent)
            with faults(self._name):
                inflate = partial(self._inflate, data, self._header.cluster_size)
                return {key: await self._in_thread(inflate, urgent=urgent)}

        plain = (await self._clusters.get([key], load))[key]
        view[piece.at : piece.at + piece.want] = memoryview(plain)[piece.skip : piece.skip + piece.want]

    async def _in_thread(self, function: Callable[[], T], *, urgent: bool) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._threads[urgent])


def _layout(header: Qcow2Header) -> Layout:
    return Layout(
        header.cluster_bits,
        header.table_bits,
        header.size,
        header.l1_offset,
        header.l1_entries,
        decode_table,
        partial(table_offset, header),
        partial(reads_zero, header),
    )
