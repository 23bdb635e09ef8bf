"""A flight: one request to the source, and the readers and consumers that wait for it.

Owns the state of a flight, and how a reader gets its bytes from it. Must not know when a request may be sent, nor the
source. The concurrency protocol is at the top of `queue.py`.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from qedfs.errors import QedfsError
from qedfs.fetch.rate_limiter import RateLimiter

log = logging.getLogger(__name__)


class Consumer(Protocol):
    """A user of the queue that stores the fetched bytes: one served image."""

    @property
    def limiter(self) -> RateLimiter:
        """Its limit. Counts what it gets in the background, whoever has requested that, but not what it asked for."""
        ...

    def lacks(self, pos: int, size: int) -> int:
        """How many bytes of this range it would store."""
        ...

    async def take(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        """Store the bytes of clusters that are still missing. `asked`: a reader of it wanted them. Must not raise."""
        ...

    def lost(self, error: QedfsError) -> None:
        """Called when a flight for this consumer has failed."""
        ...

    def wants(self, pos: int, size: int) -> bool:
        """Whether it would store bytes of this range that another consumer has fetched."""
        ...


class Flight:
    """One request. Once `arrived` is set, either `error` is set or the bytes are in `buffer`."""

    __slots__ = (
        "ahead_bytes",
        "arrived",
        "askers",
        "buffer",
        "consumers",
        "cost",
        "error",
        "first",
        "holders",
        "overdue",
        "pos",
        "rivals",
        "shares",
        "since",
        "size",
        "urgent",
    )

    def __init__(self, first: int, pos: int, size: int, buffer: bytearray, *, since: float, urgent: bool) -> None:
        self.first = first
        self.pos = pos
        self.size = size  # bytes of the image that it carries, including zeros past the source's end
        self.buffer = buffer
        self.since = since  # when it was sent, by trio's clock
        self.arrived = trio.Event()
        self.error: QedfsError | None = None
        self.consumers: list[Consumer] = []  # those that will store the bytes; only `Budget` changes it
        self.urgent = urgent  # a reader waited for it when it was sent
        self.askers: list[Consumer] = []  # those whose reader wanted it, or read-ahead or a command, not only a stream
        self.shares: dict[Consumer, int] = {}  # how many of its first bytes were counted against whose limit
        self.cost = 0  # bytes that were counted against the limit of the mount
        self.ahead_bytes = 0  # bytes that were in flight when it was sent
        self.overdue = False  # a reader has found it late
        self.rivals: list[trio.CancelScope] = []  # the requests that readers have sent because it is late
        self.holders = 1  # readers, and the flight itself until it has landed

    def fault(self) -> QedfsError:
        """The error for an unexpected exception, which must fail one flight and not every image of the mount."""
        log.exception("fetch of %d bytes at %d failed", self.size, self.pos)
        return QedfsError("internal error, see the log")

    def arrive(self) -> None:
        """Wake all waiting readers. Unless it has failed, also cancel the rival requests."""
        self.arrived.set()
        if self.error is None:
            for rival in self.rivals:
                rival.cancel()

    async def arrives(self, latest: float) -> bool:
        """Wait for the arrival, at most until `latest` by trio's clock. Returns whether it has arrived."""
        if not self.arrived.is_set():
            with trio.move_on_at(latest):
                await self.arrived.wait()
        return self.arrived.is_set()

    async def copy_to(self, pos: int, view: memoryview) -> None:
        """Wait for the arrival, and fill `view` with the bytes at `pos` of the image. Raises the flight's error."""
        await self.arrived.wait()
        if self.error is not None:
            raise self.error.fresh()
        start = pos - self.pos
        view[:] = memoryview(self.buffer)[start : start + len(view)]
