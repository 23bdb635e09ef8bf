"""A raw file on this machine as a source. Owns its descriptor; whether it may be opened is the policy's matter."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import Self

import trio

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.source.base import Extent, Identity
from qedfs.source.url import Location


class LocalSource:
    """A regular file or a block device. The version is its size and, for a file, its modification time."""

    def __init__(self, fd: int, location: Location, identity: Identity) -> None:
        self._fd = fd
        self._location = location
        self._identity = identity
        self.received = 0

    @classmethod
    async def open(cls, location: Location) -> Self:
        """Open the file.

        Raises:
            SourceError: it is not there, or neither a file nor a block device.
        """
        path = location.path or ""
        try:
            # O_NONBLOCK: a FIFO must not make us wait for a writer before we can see that it is one.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise SourceError(f"backing {location}: {exc.strerror}") from exc
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            os.close(fd)
            raise SourceError(f"backing {location} is neither a file nor a block device")
        size = os.lseek(fd, 0, os.SEEK_END)
        modified = f"{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None
        return cls(fd, location, Identity(size, last_modified=modified, name=str(location)))

    @property
    def identity(self) -> Identity:
        """Size and modification time at the opening."""
        return self._identity

    @property
    def parallel(self) -> int:
        """A local disk gains little from more."""
        return 8

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer`. Raises SourceChanged if the file has become shorter."""

        def fill() -> int:
            done = 0
            while done < len(buffer) and (count := os.preadv(self._fd, [buffer[done:]], pos + done)):
                done += count
            return done

        try:
            done = await trio.to_thread.run_sync(fill)
        except OSError as exc:
            raise SourceUnreachable(f"backing {self._location}: {exc.strerror}") from exc
        if done < len(buffer):
            raise SourceChanged(f"backing {self._location} has become shorter")
        self.received += done

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """The holes of the file, as the file system tells them."""
        end = pos + size
        try:
            start = os.lseek(self._fd, pos, os.SEEK_DATA)
        except OSError as exc:
            return [Extent(pos, size, zero=True)] if exc.errno == errno.ENXIO else None
        if start > pos:
            return [Extent(pos, min(start, end) - pos, zero=True)]
        stop = os.lseek(self._fd, pos, os.SEEK_HOLE)
        return [Extent(pos, min(stop, end) - pos, zero=False)]

    async def aclose(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
