"""The backing as a file that is written: where a commit puts the clusters of the overlay above it.

Owns the interface, and how bytes and zeros get into a raw file, and when they are durable; `qed_target.py` does it with
a QED image. Must not know the overlay above it, nor the order of a commit (`commit_down.py`).

Only what differs is written into a raw file. So a commit that was interrupted goes on where it was, and what was only
fetched from the backing keeps its blocks there. What is compared must be what the disk has, not what the page cache
shows after a write-back has failed: the file is written back and leaves the cache before its first byte is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from qedfs.errors import InUse, QedfsError
from qedfs.overlay.dropping import Below
from qedfs.overlay.file_zeros import is_zero, write_zeros
from qedfs.overlay.storage import Storage
from qedfs.source.samples import Samples

BLOCK_BYTES = 64 << 10  # compared, and written if it differs
ZEROS_AT_ONCE = 1 << 30


class Target(Below, Protocol):
    """A backing that is open for writing. Sizes and positions are in bytes of its disk. Errors are QedfsErrors.

    Nothing in the file changes before `begin`, nor after `rest`. Only then may the methods of `Below` be used.
    """

    @property
    def pinned(self) -> bool:
        """Whether a mount reads such a backing, so that overlays over it have a pin."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    async def sample(self, pos: int, size: int, samples: Samples) -> dict[int, int]:
        """Offer this part of the disk, before `begin`. Returns where in the file samples were taken, and of which pos.

        The file keeps a sample as long as nothing is written to that pos.
        """
        ...

    async def begin(self) -> None:
        """From now on, the file changes. Its size and times may do so at once."""
        ...

    async def read(self, pos: int, view: memoryview) -> None:
        """Fill `view`, inside the disk. At any time, also while others write."""
        ...

    async def read_file(self, offset: int, view: memoryview) -> None:
        """Fill `view` with bytes of the file. As `read` otherwise."""
        ...

    @property
    def file_size(self) -> int:
        """Length of the file."""
        ...

    async def grow(self, size: int) -> None:
        """Make the disk longer. What is new reads as zeros."""
        ...

    async def store(self, pos: int, view: memoryview) -> int:
        """Let the disk have these bytes. Returns how many were written."""
        ...

    async def zero(self, pos: int, size: int) -> int:
        """Let this part read as zeros, as holes if possible. Returns how many bytes changed."""
        ...

    async def sync(self) -> None:
        """Make everything durable that was written. After an error, `refresh` must come before anything else."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it takes no writes any more, so that `refresh` must come, because a barrier has failed."""
        ...

    async def refresh(self) -> None:
        """Let the reads show what the disk has, after an error of `sync`. Raises that error if this is impossible."""
        ...

    async def rest(self) -> None:
        """After this, the file does not change any more, and it is durable with its times. Again, it does nothing."""
        ...

    async def close(self) -> None:
        """Close the file."""
        ...


class RawTarget:
    """A raw file."""

    pinned = True
    failed = False  # `sync` raises an error, and that is all

    def __init__(self, storage: Storage, sync_times: Callable[[], None], *, dry: bool = False) -> None:
        """Takes over `storage`. `sync_times`: makes the times of the file durable, in a thread. `dry`: write nothing.

        A barrier (fdatasync) covers no mtime, and the pin that the overlay is about to get has this mtime.
        """
        self._storage = storage
        self._sync_times = sync_times
        self._dry = dry
        self._old = bytearray()

    @classmethod
    async def of(cls, storage: Storage, sync_times: Callable[[], None], *, dry: bool = False) -> Self:
        """`refresh` comes first."""
        made = cls(storage, sync_times, dry=dry)
        await made.refresh()
        return made

    async def refresh(self) -> None:
        """Let the reads show what the disk has, see the head of the module. Raises what `Storage.refresh` raises."""
        storage = self._storage
        try:
            await storage.in_thread(storage.refresh)
        except InUse as exc:
            raise InUse(
                f"{storage.path}: another program keeps part of it in memory, so what is on the disk cannot be read;"
                " close that program first"
            ) from exc

    @property
    def size(self) -> int:
        """Length of the file."""
        return self._storage.size()

    async def sample(self, pos: int, size: int, samples: Samples) -> dict[int, int]:
        """See `Target.sample`."""
        view = memoryview(bytearray(size))
        await self.read(pos, view)
        known = set(samples.places)
        samples.offer(pos, view)
        return {place: place for place in samples.places if place not in known}

    async def begin(self) -> None:
        """Nothing: the first write changes the file."""

    async def rest(self) -> None:
        """Nothing: what was written is durable after `sync`, and nobody writes any more."""

    async def grow(self, size: int) -> None:
        """ftruncate."""
        if not self._dry:
            await self._storage.in_thread(lambda: self._storage.resize(size))

    @property
    def file_size(self) -> int:
        """The disk is the file."""
        return self.size

    async def read_file(self, offset: int, view: memoryview) -> None:
        """See `read`."""
        await self.read(offset, view)

    async def read(self, pos: int, view: memoryview) -> None:
        """Fill `view`."""
        await self._storage.in_thread(lambda: self._storage.read(pos, view))

    def read_now(self, pos: int, view: memoryview) -> bool:
        """Fill `view` from the page cache; False if that would have to wait. See `Below`."""
        return self._storage.read_now(pos, view)

    def read_waiting(self, pos: int, view: memoryview) -> None:
        """Fill `view`, in this thread."""
        self._storage.read(pos, view)

    def hole_end(self, pos: int) -> int:
        """Where the hole ends that `pos` is in; `pos` itself if it is in none."""
        extent = self._storage.extent(pos)
        return extent.end if extent.hole else pos

    async def store(self, pos: int, view: memoryview) -> int:
        """Write the blocks that differ."""
        return await self._storage.in_thread(lambda: self._store(pos, view))

    def _store(self, pos: int, view: memoryview) -> int:
        if len(self._old) != len(view):
            self._old = bytearray(len(view))
        self._storage.read(pos, memoryview(self._old))
        if self._old == view:
            return 0
        written = 0
        # Blocks of the file, so that it does not matter in how many calls a part comes.
        for start in range(pos - pos % BLOCK_BYTES, pos + len(view), BLOCK_BYTES):
            at, end = max(0, start - pos), start - pos + BLOCK_BYTES
            block = view[at:end]
            if self._old[at:end] != block:
                if not self._dry:
                    self._storage.write(pos + at, [block])
                written += len(block)
        return written

    async def zero(self, pos: int, size: int) -> int:
        """Punch holes where the file has data. Past the end of the file are zeros."""
        changed, end = 0, min(pos + size, await self._storage.in_thread(self._storage.size))
        while pos < end:
            start, stop = pos, min(end, pos + ZEROS_AT_ONCE)
            changed += await self._storage.in_thread(lambda: self._zero(start, stop))  # noqa: B023 - it runs here
            pos = stop
        return changed

    def _zero(self, pos: int, end: int) -> int:
        changed = 0
        while pos < end:
            extent = self._storage.extent(pos)
            stop = min(extent.end, end)
            if not extent.hole:
                changed += self._punch(pos, stop - pos)
            pos = stop
        return changed

    def _punch(self, pos: int, size: int) -> int:
        if self._dry:
            return size
        if self._storage.punch(pos, size):
            return size
        if is_zero(self._storage, pos, size):  # the file system has no holes to punch
            return 0
        write_zeros(self._storage, pos, size)
        return size

    async def sync(self) -> None:
        """A barrier, then fsync for the times."""
        await self._storage.in_thread(self._storage.barrier)
        try:
            await self._storage.in_thread(self._sync_times)
        except OSError as exc:
            raise QedfsError(f"{self._storage.path}: cannot sync: {exc.strerror}") from exc

    async def close(self) -> None:
        """Close the file, which releases its locks. In a thread, as a file server has to answer."""
        await self._storage.in_thread(self._storage.close)
