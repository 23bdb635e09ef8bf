"""QedSource: the virtual disk of a QED image as a read-only source, over the source that has the file.

Owns the order of reads: first L2 tables, then data. Must not know where the file is. `format.py` knows what an entry
means and what is refused. The file is neither locked nor changed. Only the tables in the file count, as for
a QEMU that opens the image read-only.

An image that is marked as not cleanly closed (NEED_CHECK) is read as it is, as QEMU does when it opens one
read-only. Its entries may refer to clusters that the file does not have; reading those is an error. An image that qedfs
serves, or served when it was killed, is read as it is, too, though the journal of that mount may have entries that the
tables lack. Both are logged, since an overlay that takes everything from such an image lacks the same writes.

Concurrency. Any number of tasks may read. They share the tables, whose rules are in `tables/cache.py`, and no other
mutable state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from qedfs.errors import SourceUnreachable
from qedfs.format.header import HEADER_BYTES, UNTOUCHED, Header
from qedfs.format.record import SLOT_BYTES, decode_record, slot_offsets
from qedfs.format.tables import decode_table
from qedfs.source.base import Extent, Identity, Source, check_range
from qedfs.source.qed.format import decode_header, plan_read, reads_zero, table_offset
from qedfs.source.tables.faults import faults
from qedfs.source.tables.reads import Batch, Data, join, part, read_batch, run_all
from qedfs.source.tables.two_levels import Layout, TwoLevels, disk_identity
from qedfs.source.zeros import clear

log = logging.getLogger(__name__)


class QedSource:
    """A `Source` over another one. Create it with `open`. It owns the inner source and closes it."""

    def __init__(self, inner: Source, name: str, header: Header, tables: TwoLevels) -> None:
        self._inner = inner
        self._name = name
        self._header = header
        self._file_size = inner.identity.size
        self._tables = tables
        self._identity = disk_identity(inner.identity, header.geometry.image_size, "QED", tables.stamp)
        self._closed = False

    @classmethod
    async def open(cls, inner: Source, name: str, told: set[str] | None = None) -> QedSource:
        """Read the header and the L1 table. `name` names the image in messages. `inner` stays open on failure.

        `told`: the warnings that users have had of this image. They are not repeated, and new ones are added.

        Raises:
            SourceError: not a QED image, or one that cannot be served, see `format.py`.
            SourceUnreachable, SourceChanged: as `Source.read`.
        """
        file_size = inner.identity.size
        head = bytearray(min(HEADER_BYTES, file_size))
        await inner.read(0, memoryview(head))
        with faults(name):
            header = decode_header(bytes(head), file_size)
        told = set() if told is None else told
        if header.dirty:
            _warn(f"backing {name} was not closed cleanly; it is read as it is, see qemu-img check", told)
        if await _in_session(inner, header):
            _warn(
                f"backing {name} is mounted itself, or was when that mount was killed; it is read as it is, which may"
                " lack the last writes; unmount it, or mount it once, before an overlay takes anything from it",
                told,
            )
        return cls(inner, name, header, await TwoLevels.load(inner, name, _layout(header, file_size), bytes(head)))

    @property
    def identity(self) -> Identity:
        """The version, see `disk_identity`."""
        return self._identity

    @property
    def file(self) -> Source:
        """The source of the QED file."""
        return self._inner

    @property
    def received(self) -> int:
        """Bytes received of the file, including tables."""
        return self._inner.received

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> int:
        """Fill `buffer`, see `Source.read`. A damaged entry is a SourceError.

        Returns how many bytes of the file hold the range. Tables are not counted: they are read once.
        """
        view = buffer.cast("B")
        self._check(pos, len(view))
        if not len(view):
            return 0
        entries = await self._tables.entries(pos, len(view), urgent=urgent)
        with faults(self._name):
            plan = plan_read(self._header, self._file_size, pos, len(view), entries)
        for zeros in plan.zeros:
            clear(view[zeros.at : zeros.at + zeros.size])
        batches = join(plan.data)
        await run_all([partial(self._read_batch, batch, view, urgent=urgent) for batch in batches])
        return sum(batch.size for batch in batches)

    async def _read_batch(self, batch: Batch[Data], view: memoryview, *, urgent: bool) -> None:
        """Read a batch from the file, and put its pieces into the reader's buffer."""
        if len(batch.pieces) == 1:
            piece = batch.pieces[0]
            await self._inner.read(piece.offset, view[piece.at : piece.at + piece.size], urgent=urgent)
            return
        data = await read_batch(self._inner, batch, urgent=urgent)
        for piece in batch.pieces:
            view[piece.at : piece.at + piece.size] = part(data, batch, piece)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the range are missing or zero, up to a limit per call. See `Source.extents`."""
        self._check(pos, size)
        return await self._tables.extents(pos, size)

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the cached tables say that the range reads as zeros, see `KnowsZeros`."""
        if self._closed or size <= 0 or pos < 0 or pos + size > self._identity.size:
            return False
        return self._tables.zeros_now(pos, size)

    async def aclose(self) -> None:
        """Close the file's source. Later reads raise SourceUnreachable."""
        self._closed = True
        self._tables.close()
        await self._inner.aclose()

    def _check(self, pos: int, size: int) -> None:
        check_range(pos, size, self._identity.size)
        if self._closed:
            raise SourceUnreachable(f"backing {self._name}: closed")


def _warn(text: str, told: set[str]) -> None:
    log.log(logging.DEBUG if text in told else logging.WARNING, "%s", text)
    told.add(text)


async def _in_session(inner: Source, header: Header) -> bool:
    """Whether a mount of the image has begun, has not ended, and keeps a journal. No read unless qedfs wrote last."""
    slots = slot_offsets(header)
    if slots is None or not header.autoclear_features & UNTOUCHED:
        return False
    data = bytearray(2 * SLOT_BYTES)  # one after the other
    await inner.read(slots[0], memoryview(data))
    record = decode_record((bytes(data[:SLOT_BYTES]), bytes(data[SLOT_BYTES:])))
    return record is not None and bool(record.session and record.journal)


def _layout(header: Header, file_size: int) -> Layout:
    geometry = header.geometry
    return Layout(
        geometry.cluster_size.bit_length() - 1,
        geometry.entries.bit_length() - 1,
        geometry.image_size,
        header.l1_table_offset,
        geometry.l1_used,
        decode_table,
        partial(table_offset, header, file_size),
        reads_zero,
    )
