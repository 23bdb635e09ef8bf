"""A raw local file or block device as a source. Notices if the file changes while it is open.

Owns its descriptor. Must not know what may be opened, which the policy decides.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import Self

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.source.base import Extent, HasFile, Identity, Source, check_range
from qedfs.source.path import Held, in_thread
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.url import Location

_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # shortages that may soon be over


class LocalSource:
    """A regular file or a block device. The version is its size and, for a file, its modification time."""

    def __init__(self, fd: int, location: Location, identity: Identity, modified: str | None, samples: Samples) -> None:
        self._fd = fd
        self._location = location
        self._path = location.path or ""
        self._identity = identity
        self._modified = modified  # when opened; must not change while the file is open, whatever the pinning
        self._samples = samples
        self.received = 0

    @classmethod
    async def open(
        cls, location: Location, policy: Policy, *, pinning: Pinning = USUAL, samples: Samples | None = None
    ) -> Self:
        """Open the file.

        Raises:
            Refused: `policy` does not allow the file that the path leads to.
            SourceUnreachable: no descriptor or memory is available now.
            SourceError: it does not exist, cannot be opened, or is neither a file nor a block device.
        """
        samples = Samples() if samples is None else samples
        return await in_thread(location.path or "", lambda: cls._open(location, policy, pinning, samples))

    @classmethod
    def _open(cls, location: Location, policy: Policy, pinning: Pinning, samples: Samples) -> Self:
        try:
            with Held(location, policy) as held:
                # O_NONBLOCK: opening a FIFO must not wait for a writer before we see that it is a FIFO.
                fd = os.open(held.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            kind = SourceUnreachable if exc.errno in _TRANSIENT else SourceError
            raise kind(f"backing {location}: {exc.strerror}") from exc
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            os.close(fd)
            raise SourceError(f"backing {location} is neither a file nor a block device")
        size = os.lseek(fd, 0, os.SEEK_END)
        identity = Identity(size, last_modified=_modified(status), name=str(location))
        return cls(fd, location, pinning.counted(identity), _modified(status), samples)

    @property
    def identity(self) -> Identity:
        """Size and modification time when the file was opened."""
        return self._identity

    def is_on(self, status: os.stat_result) -> bool:
        """Whether it has this file open."""
        return self._fd >= 0 and os.path.samestat(os.fstat(self._fd), status)

    async def sync(self) -> None:
        """Make what was written to the file durable, and its times. Raises SourceUnreachable."""
        self._check(0, 0)
        try:
            await in_thread(self._path, lambda: os.fsync(self._fd))
        except OSError as exc:
            raise SourceUnreachable(f"backing {self._location}: cannot sync: {exc.strerror}") from exc

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer`. Raises SourceChanged if the file has been truncated or written to."""
        view = buffer.cast("B")
        self._check(pos, len(view))
        try:
            data = await in_thread(self._path, lambda: self._read(pos, len(view)))
        except OSError as exc:
            raise SourceUnreachable(f"backing {self._location}: {exc.strerror}") from exc
        if len(data) < len(view):
            raise SourceChanged(f"backing {self._location} has become shorter")
        # The thread reads into its own buffer, because it may go on after this call has been cancelled.
        view[:] = data
        self.received += len(data)
        self._samples.offer(pos, view)

    def _check(self, pos: int, size: int) -> None:
        check_range(pos, size, self._identity.size)
        if self._fd < 0:
            raise SourceUnreachable(f"backing {self._location}: closed")

    def _read(self, pos: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self._fd, size, pos)):
            parts.append(part)
            pos, size = pos + len(part), size - len(part)
        self._check_version()
        return b"".join(parts)

    def _check_version(self) -> None:
        """Call this after every access to the file, so that it detects any change made before the access."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size != self._identity.size:
            raise SourceChanged(f"backing {self._location} had {self._identity.size} bytes, has {size} now")
        if _modified(os.fstat(self._fd)) != self._modified:
            raise SourceChanged(f"backing {self._location} has been written to since it was opened")

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """The holes of the file, as reported by the file system. Raises SourceChanged as `read` does."""
        self._check(pos, size)
        if not size:
            return []
        try:
            return await in_thread(self._path, lambda: self._extents(pos, size))
        except OSError as exc:
            raise SourceUnreachable(f"backing {self._location}: {exc.strerror}") from exc

    def _extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        found = self._first_extent(pos, pos + size)
        # After a truncation or a hole punch, the file would report holes, and the overlay would store them as zeros.
        self._check_version()
        return found

    def _first_extent(self, pos: int, end: int) -> Sequence[Extent] | None:
        try:
            start = os.lseek(self._fd, pos, os.SEEK_DATA)
        except OSError as exc:
            return [Extent(pos, end - pos, zero=True)] if exc.errno == errno.ENXIO else None
        if start > pos:
            return [Extent(pos, min(start, end) - pos, zero=True)]
        stop = os.lseek(self._fd, pos, os.SEEK_HOLE)
        return [Extent(pos, min(stop, end) - pos, zero=False)]

    async def aclose(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # If `open` was abandoned at its deadline, its thread may still return this object, but nobody receives it.
        if self._fd >= 0:
            os.close(self._fd)


def local_file(source: Source | None) -> LocalSource | None:
    """The source of the local file that `source` is, or decodes; None if it is another one."""
    file = source.file if isinstance(source, HasFile) else source
    return file if isinstance(file, LocalSource) else None


def _modified(status: os.stat_result) -> str | None:
    return f"{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None
