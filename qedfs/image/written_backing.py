"""A backing as a source while this process writes to it. Its times move all the time, so they tell no version.

Owns nothing but the reads that are under way. Must not know who writes, nor what. The file is locked, and nobody else
had it open before, so that all changes are our own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import outcome
import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.image.commit_target import Target
from qedfs.source.base import Extent, Identity, check_range
from qedfs.source.url import Location

Read = Callable[[int, memoryview], Awaitable[None]]


class _Written:
    """A `Source` of some of its bytes."""

    def __init__(self, read: Read, size: int, location: Location) -> None:
        self.identity = Identity(size, name=str(location))
        self.received = 0
        self._read_from = read
        self._location = location
        self._reads = 0
        self._closed = False
        self._idle = trio.Event()

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """See `Source.read`."""
        check_range(pos, len(buffer), self.identity.size)
        if self._closed:
            raise self._gone()
        self._reads += 1
        try:
            view = buffer.cast("B")
            # The read gets a buffer and a task of its own, so that a reader can give up: a disk may hang.
            view[:] = await self._read(pos, len(view))
        except QedfsError as exc:
            raise SourceUnreachable(f"backing {self._location}: {exc}") from exc
        finally:
            self._reads -= 1
            if not self._reads:
                self._idle.set()
        self.received += len(buffer)

    async def _read(self, pos: int, size: int) -> bytearray:
        """As `read`, of a `Target`. If the caller is cancelled, the read goes on, and nobody gets its bytes."""
        found, ended = bytearray(size), trio.Event()
        result: outcome.Outcome[None] | None = None

        async def read() -> None:
            nonlocal result
            result = await outcome.acapture(self._read_from, pos, memoryview(found))
            ended.set()

        trio.lowlevel.spawn_system_task(read)
        await ended.wait()
        assert result is not None  # noqa: S101 - for the type checker
        result.unwrap()
        return found

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Unknown, as they change."""
        check_range(pos, size, self.identity.size)
        if self._closed:
            raise self._gone()
        return None

    async def aclose(self) -> None:
        """Let no further read begin, and wait for those under way whose readers have not given up."""
        self._closed = True
        while self._reads:
            self._idle = trio.Event()
            await self._idle.wait()

    def _gone(self) -> SourceUnreachable:
        return SourceUnreachable(f"backing {self._location}: closed")


class WrittenBacking(_Written):
    """A `Source`. Whoever made it closes the file, after `aclose`."""

    def __init__(self, target: Target, location: Location) -> None:
        super().__init__(target.read, target.size, location)
        self.file = _Written(target.read_file, target.file_size, location)
        """See `HasFile`. Its length is that of the beginning, before which all samples are."""

    async def aclose(self) -> None:
        """See `Source.aclose`. Reads of the file end, too."""
        await super().aclose()
        await self.file.aclose()
