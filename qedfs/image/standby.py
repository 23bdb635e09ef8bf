"""What an image reads from in standby, while another program may still change the source.

Owns the pass-through: each read asks the source, and nothing of the answer is kept. Two readers of the same bytes ask
twice, because the later one may see bytes that were written after the first one had asked. The reader of a disk image
format keeps its tables, so each read of such a source gets a new one. Must not know the overlay, nor when the standby
ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from qedfs.errors import QedfsError, SourceChanged
from qedfs.source.base import HasFile
from qedfs.source.retrying import RetryingSource

log = logging.getLogger(__name__)

# A read fails after this time, so that a program which opens the image before its source is there is not held up.
# Programs that probe a disk (QEMU) go on after such an error.
DEADLINE_SECONDS = 1.0
TRIES = 3  # of a read whose source becomes another version meanwhile
DECODED_AT_ONCE = 4  # reads, and so connections, of a disk image


class PassThrough:
    """The source of one image in standby. It may change at any time, so that its versions are not compared."""

    def __init__(self, make: Callable[[], RetryingSource], release: Callable[[RetryingSource], None]) -> None:
        """`make`: a source that connects when it is first read. `release`: called when one is no longer needed."""
        self._make = make
        self._release = release
        self._few = trio.CapacityLimiter(DECODED_AT_ONCE)
        self.remote = make()

    async def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view with the source's bytes at its position, and with zeros past its end.

        Raises the errors of the source.
        """
        for _ in range(TRIES):
            remote = self.remote
            try:
                await self._read(remote, pieces)
            except QedfsError as exc:
                error = exc.fresh()
                if remote is self.remote:
                    if not isinstance(exc, SourceChanged):
                        raise
                    # It compares what it reads with what it has read before. A new one has read nothing yet.
                    self.remote = self._make()
                    self._release(remote)
            else:
                return
        raise error

    async def _read(self, remote: RetryingSource, pieces: Sequence[tuple[int, memoryview]]) -> None:
        async with remote.reader():
            await remote.connect()
            keeps_tables = isinstance(remote.connected, HasFile)
            if keeps_tables:
                await self._read_anew(pieces)
            else:
                await _fill(remote, pieces)

    async def _read_anew(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        async with self._few:
            own = self._make()
            try:
                await _fill(own, pieces)
            finally:
                self._release(own)


async def _fill(remote: RetryingSource, pieces: Sequence[tuple[int, memoryview]]) -> None:
    size = (await remote.connect()).size
    for pos, view in pieces:
        wanted = max(0, min(len(view), size - pos))
        if wanted:
            await remote.read(pos, view[:wanted], urgent=True)
        view[wanted:] = bytes(len(view) - wanted)
