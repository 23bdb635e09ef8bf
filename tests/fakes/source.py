"""A source in memory, with a round trip, faults on request, and a count of what was asked for.

Implements the port `qedfs/source/base.py`. Time is trio's clock, so a mock clock makes any round trip instant.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.source.base import Extent, Identity, check_range
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.url import parse_location


class FakeSource:
    """`content` as a source. Faults: `fail` is raised by the next reads; `gate` holds them until it is set."""

    def __init__(
        self, content: bytes, *, round_trip: float = 0.02, etag: str | None = '"v1"', last_modified: str | None = None
    ) -> None:
        self.content = content
        self.identity = Identity(len(content), etag, last_modified, name="http://fake/")
        self.samples = Samples()  # of the `RetryingSource`
        self.received = 0
        self.round_trip = round_trip
        self.reads: list[tuple[int, int, bool]] = []  # (pos, size, urgent), in the order in which they came
        self.fail: QedfsError | None = None
        self.gate: trio.Event | None = None
        self.holes: list[tuple[int, int]] | None = None  # (pos, size) that `extents` tells; None: it cannot tell
        self.is_closed = False
        self.in_flight = 0
        self.most_in_flight = 0

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer` after a round trip."""
        view = buffer.cast("B")
        self._check(pos, len(view))
        self.reads.append((pos, len(view), urgent))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await trio.sleep(self.round_trip)
            if self.fail is not None:
                # What a failed read leaves behind must never be used.
                view[:] = b"\xee" * len(view)
                raise self.fail
            self._check(pos, len(view))
            view[:] = self.content[pos : pos + len(view)]
            self.received += len(view)
            self.samples.offer(pos, view)
        finally:
            self.in_flight -= 1

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """The holes of `holes`, one extent at a time, as some servers answer."""
        self._check(pos, size)
        if self.holes is None or not size:
            return None
        for start, length in self.holes:
            if start <= pos < start + length:
                return [Extent(pos, min(size, start + length - pos), zero=True)]
            if start > pos:
                return [Extent(pos, min(size, start - pos), zero=False)]
        return [Extent(pos, size, zero=False)]

    async def aclose(self) -> None:
        """Reads under way end with the round trip, and then as later ones."""
        self.is_closed = True

    def _check(self, pos: int, size: int) -> None:
        check_range(pos, size, self.identity.size)
        if self.is_closed:
            raise SourceUnreachable("http://fake/: closed")

    @property
    def bytes_read(self) -> int:
        """Bytes that crossed the wire."""
        return sum(size for _, size, _ in self.reads)


def remote(source: FakeSource, *, deadline_seconds: float = 30.0, pinning: Pinning = USUAL) -> RetryingSource:
    """A `RetryingSource` that always connects to `source`."""

    async def connect() -> FakeSource:
        await trio.sleep(source.round_trip)
        source.is_closed = False
        return source

    location = parse_location("http://fake/disk.raw")
    return RetryingSource(location, connect, deadline_seconds=deadline_seconds, pinning=pinning, samples=source.samples)
