"""A QED image as the backing that a commit writes to.

Owns how the file changes from one that is only read to one that a session writes to, and back. Must not know the
overlay above it, nor the order of a commit (`commit_down.py`, `live_commit.py`). How a session keeps the file whole,
whatever happens, is in `overlay/`: data, barrier, entries.

1. At first, the file is locked, and nothing in it changes: samples are taken, which the overlay above must have durably
   before the file's times move. They are of the file, where its clusters are. A cluster stays in its place as long as
   nobody discards it.
2. `begin` opens it as an overlay, which changes its header and record at once. Everything is written, as what it lacks
   cannot be compared. There is no journal: who needs a write waits for its entries.
3. `rest` ends the session, which changes the record once more, and has the file fsynced with its times: the pin that
   the overlay above is about to get has them. Then it is opened again, only for reading. In between nobody has it
   locked, so it counts only if nothing in it has changed since the fsync. While this goes on, readers wait.

From then on it is read by a walk from L1 to the cluster for each request: a few reads of the page cache, which need no
await, and so no table has to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import trio

from qedfs.errors import BadOverlay, InStandby, InUse, NoMemory, QedfsError, SourceUnreachable, UsageError
from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.header import Header
from qedfs.format.record import Record
from qedfs.format.tables import decode_table
from qedfs.image.image import Image
from qedfs.image.zero_range import make_zeros
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header, read_record
from qedfs.overlay.storage import Buffer, Storage
from qedfs.source.qed.format import Plan, plan_read, table_offset
from qedfs.source.samples import Samples
from qedfs.source.tables.faults import faults

_WAY_OUT = "unmount the image, and use qedfs commit OVERLAY, which recovers it first"
LOOK_SECONDS = 0.001  # between two looks whether reads have ended
Read = Callable[[int, memoryview], bool]
"""Fills a buffer with the bytes at an offset of the file. False if it does not want to wait for the disk."""


class StillQed:
    """The disk in a QED file without a backing, which does not change. It implements `Below`."""

    def __init__(self, storage: Storage, header: Header, name: str) -> None:
        """Takes over `storage`. `name`: for messages."""
        self.storage = storage
        self.header = header
        self._name = name
        self._file_size = storage.size()

    def read_now(self, pos: int, view: memoryview) -> bool:
        """See `Below`."""
        return self._fill(pos, view, self.storage.read_now)

    def read_waiting(self, pos: int, view: memoryview) -> None:
        """See `Below`."""
        self._fill(pos, view, self._wait)

    def hole_end(self, pos: int) -> int:
        """See `Below`. The end of the cluster, if that is a hole."""
        geometry = self.header.geometry
        end = min((pos // geometry.cluster_size + 1) * geometry.cluster_size, geometry.image_size)
        return end if end <= pos or not self.plan(pos, end - pos).data else pos

    def plan(self, pos: int, size: int) -> Plan:
        """What a part of the disk consists of. Waits for the disk."""
        plan = self._plan(pos, size, self._wait)
        assert plan is not None  # noqa: S101 - for the type checker; `_wait` waits
        return plan

    def _wait(self, offset: int, view: memoryview) -> bool:
        self.storage.read(offset, view)
        return True

    def _fill(self, pos: int, view: memoryview, read: Read) -> bool:
        plan = self._plan(pos, len(view), read)
        if plan is None:
            return False
        for zeros in plan.zeros:
            view[zeros.at : zeros.at + zeros.size] = bytes(zeros.size)
        return all(read(data.offset, view[data.at : data.at + data.size]) for data in plan.data)

    def _plan(self, pos: int, size: int, read: Read) -> Plan | None:
        entries = self._entries(pos, size, read)
        if entries is None:
            return None
        with faults(self._name):
            return plan_read(self.header, self._file_size, pos, size, entries)

    def _entries(self, pos: int, size: int, read: Read) -> list[int] | None:
        """The L2 entries of the clusters of a range."""
        geometry = self.header.geometry
        cluster, last = pos // geometry.cluster_size, (pos + size - 1) // geometry.cluster_size
        found: list[int] = []
        while cluster <= last:
            index, at = divmod(cluster, geometry.entries)
            count = min(geometry.entries - at, last + 1 - cluster)
            cluster += count
            l1 = _words(self.header.l1_table_offset + ENTRY_SIZE * index, 1, read)
            if l1 is None:
                return None
            with faults(self._name):
                table = table_offset(self.header, self._file_size, l1[0])
            entries = [0] * count if table is None else _words(table + ENTRY_SIZE * at, count, read)
            if entries is None:
                return None
            found += entries
        return found


def _words(offset: int, count: int, read: Read) -> list[int] | None:
    view = memoryview(bytearray(ENTRY_SIZE * count))
    return decode_table(view).tolist() if read(offset, view) else None


class QedTarget:
    """A `Target`. `reopened` makes the file durable with its times and opens it again, see `rest`."""

    def __init__(
        self,
        name: str,
        still: StillQed,
        record: Record | None,
        backing: str | None,
        reopened: Callable[[], Storage],
        *,
        dry: bool,
    ) -> None:
        self._name = name
        self._file = still.storage
        self._still: StillQed | None = still  # but for the time of the session
        self._header = still.header  # as it was at first
        self._size = still.header.geometry.image_size  # while there is no session
        self._record = record
        self._backing = backing
        self._reopened = reopened
        self._dry = dry
        self._overlay: Overlay | None = None  # between `begin` and `rest`
        self._image: Image | None = None  # of it
        self._passage: trio.Event | None = None  # while it changes from one to the other
        self._reads = 0  # under way
        self._lost: QedfsError | None = None  # why `rest` has failed

    @classmethod
    async def of(cls, name: str, storage: Storage, reopened: Callable[[], Storage], *, dry: bool = False) -> Self:
        """Take over `storage`, which is locked. `name`: for messages. `dry`: write nothing, so it need not be writable.

        Raises BadOverlay: it cannot be read. Then `storage` stays open.
        """

        def looked_at() -> tuple[StillQed, Record | None, str | None]:
            header, backing = read_header(storage)
            return StillQed(storage, header, name), read_record(storage, header), backing

        try:
            return cls(name, *await storage.in_thread(looked_at), reopened, dry=dry)
        except BadOverlay as exc:
            raise BadOverlay(f"backing {name}: {exc}") from exc

    @property
    def pinned(self) -> bool:
        """Whether it has no backing itself."""
        return self._backing is None

    def check(self, cluster_size: int, image_size: int) -> None:
        """Raise UsageError unless it takes a commit of an image with clusters of this size. Writes nothing."""
        geometry = self._header.geometry
        if self._backing is None:
            return
        if self._record is not None and self._record.standby.waits:
            raise InStandby(f"backing {self._name}: is in standby; qedfs activate ends that")
        if geometry.cluster_size > cluster_size or (
            geometry.image_size > image_size and image_size % geometry.cluster_size
        ):
            raise UsageError(
                f"backing {self._name}: has clusters of {geometry.cluster_size} bytes over a backing of its own,"
                " and the clusters of the overlay do not fill them; use qemu-img commit"
            )
        if geometry.image_size < image_size:
            raise UsageError(
                f"backing {self._name}: has {geometry.image_size} bytes, fewer than the {image_size} of the image, and"
                f" a backing of its own; qedfs resize it to {image_size} bytes first"
            )

    def check_settled(self) -> None:
        """Raise UsageError if an opening for writing would change what it reads as: it was not closed in order.

        A mount reads the tables as they are. A repair, or the journal of a mount of it that was killed, would change
        missing clusters of the overlay above under its guests. If the user repaired it,
        it would be another version than the overlay's. The command without a mount compares it before it recovers it.
        """
        record = self._record
        if self._header.dirty:
            raise UsageError(f"backing {self._name}: was not closed cleanly; {_WAY_OUT}")
        if record is not None and record.session and record.journal:
            raise UsageError(f"backing {self._name}: a mount of it was killed; {_WAY_OUT}")

    @property
    def size(self) -> int:
        """Bytes of its disk."""
        return self._size if self._overlay is None else self._overlay.image_size

    async def sample(self, pos: int, size: int, samples: Samples) -> dict[int, int]:
        """See `Target.sample`. Only data is offered."""
        still = self._resting()
        taken: dict[int, int] = {}

        def look() -> None:
            for data in still.plan(pos, size).data:
                view = memoryview(bytearray(data.size))
                still.storage.read(data.offset, view)
                known = set(samples.places)
                samples.offer(data.offset, view)
                new = (place for place in samples.places if place not in known)
                taken.update((place, pos + data.at + place - data.offset) for place in new)

        await still.storage.in_thread(look)
        return taken

    async def begin(self) -> None:
        """See `Target.begin`."""
        if self._dry or self._overlay is not None:
            return
        storage = self._resting().storage
        try:
            overlay = await open_storage(storage)
        except (BadOverlay, InUse, NoMemory) as exc:
            raise type(exc)(f"backing {self._name}: {exc}") from exc
        self._take(overlay)
        self._still = None  # the storage is the overlay's now

    def _take(self, overlay: Overlay) -> None:
        self._overlay, self._image = overlay, Image(self._name, overlay, None)

    async def read(self, pos: int, view: memoryview) -> None:
        """See `Target.read`."""
        while self._passage is not None:
            await self._passage.wait()
        self._reads += 1
        try:
            if self._image is None:
                still = self._resting()
                await still.storage.in_thread(lambda: still.read_waiting(pos, view))
            else:
                view[:] = await self._image.read(pos, len(view))
        finally:
            self._reads -= 1

    @property
    def file_size(self) -> int:
        """See `Target.file_size`."""
        return self._file.size()

    async def read_file(self, offset: int, view: memoryview) -> None:
        """See `Target.read_file`."""
        while self._passage is not None:
            await self._passage.wait()
        file = self._file
        self._reads += 1
        try:
            await file.in_thread(lambda: file.read(offset, view))
        finally:
            self._reads -= 1

    async def grow(self, size: int) -> None:
        """See `Overlay.grow`."""
        if not self._dry:
            overlay = self._written()
            await overlay.grow(size)
            self._take(overlay)  # of the new size

    async def store(self, pos: int, view: memoryview) -> int:
        """Write all."""
        if not self._dry:
            await self._written().write(pos, view, _no_rest)
        return len(view)

    async def zero(self, pos: int, size: int) -> int:
        """Whole clusters become zero clusters."""
        if not self._dry:
            self._written()
            assert self._image is not None  # noqa: S101 - for the type checker
            await make_zeros(self._image, pos, size)
        return size

    async def sync(self) -> None:
        """See `Overlay.flush`."""
        if self._overlay is not None:
            await self._overlay.flush()

    @property
    def failed(self) -> bool:
        """Whether a barrier of the session has failed, or the end of the session."""
        return self._lost is not None or (self._overlay is not None and self._overlay.failure is not None)

    async def refresh(self) -> None:
        """A session whose barrier or end has failed takes no writes any more, so its error is raised again."""
        if self._lost is not None:
            raise self._lost.fresh()
        if self._overlay is not None and self._overlay.failure is not None:
            raise self._overlay.failure.fresh()

    async def rest(self) -> None:
        """See the head of the module. After an error it cannot be used, and raises that error again.

        Raises:
            InUse: another program has changed the file, or opened it for writing.
            QedfsError: the disk fails.
        """
        if self._lost is not None:
            raise self._lost.fresh()
        overlay = self._overlay
        if overlay is None:
            return
        # Nobody may find it half way.
        with trio.CancelScope(shield=True):
            self._passage = trio.Event()
            try:
                while self._reads:  # noqa: ASYNC110 - once in a commit
                    await trio.sleep(LOOK_SECONDS)
                await self._come_to_rest(overlay)
            except QedfsError as exc:
                self._lost = exc
                raise
            finally:
                self._passage.set()
                self._passage = None

    async def _come_to_rest(self, overlay: Overlay) -> None:
        self._overlay = self._image = None
        self._size = overlay.image_size
        await overlay.close()
        storage = await trio.to_thread.run_sync(self._reopened)
        try:
            header, _ = await storage.in_thread(lambda: read_header(storage))
            self._file, self._still = storage, StillQed(storage, header, self._name)
        except BaseException:
            storage.close()
            raise

    def read_now(self, pos: int, view: memoryview) -> bool:
        """See `Below`."""
        return self._resting().read_now(pos, view)

    def read_waiting(self, pos: int, view: memoryview) -> None:
        """See `Below`."""
        self._resting().read_waiting(pos, view)

    def hole_end(self, pos: int) -> int:
        """See `Below`."""
        return self._resting().hole_end(pos)

    async def close(self) -> None:
        """Close the file, and end the session if there is one."""
        overlay, still = self._overlay, self._still
        self._overlay = self._image = self._still = None
        if overlay is not None:
            await overlay.close()
        if still is not None:
            await still.storage.in_thread(still.storage.close)

    def _resting(self) -> StillQed:
        if self._lost is not None:
            # An error that is retried: readers that have waited for the end of `rest` are about to get another source.
            raise SourceUnreachable(f"backing {self._name}: {self._lost}")
        assert self._still is not None  # noqa: S101 - before `begin` or after `rest`
        return self._still

    def _written(self) -> Overlay:
        assert self._overlay is not None  # noqa: S101 - between `begin` and `rest`
        return self._overlay


async def _no_rest(cluster: int) -> Buffer:
    """What is missing around a write: nothing, as `QedTarget.check` has made sure."""
    raise QedfsError(f"cluster {cluster} of the backing would have to be filled from elsewhere")
