"""A request under way and those who wait for it: the state that readers, takers and the queue share.

Owns what a flight is and how a reader gets its bytes out of it. Must not know when a request may leave, nor the source.
The rules of its use are in the protocol at the top of `queue.py`.
"""

from __future__ import annotations

from typing import Protocol

import trio

from qedfs.errors import QedfsError


class Consumer(Protocol):
    """Somebody who keeps fetched bytes: one served image."""

    async def take(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        """Keep what of these bytes is still missing; `asked`: a reader wanted them. Must not raise."""
        ...

    def lost(self, error: QedfsError) -> None:
        """A flight that it was a taker of has failed."""
        ...

    def wants(self, pos: int, size: int) -> bool:
        """Whether it would keep bytes of this range that somebody else has fetched."""
        ...


class Flight:
    """One request under way. `error` or the bytes are there when `arrived` is set."""

    __slots__ = (
        "arrived",
        "asked",
        "behind",
        "buffer",
        "consumers",
        "error",
        "first",
        "holders",
        "overdue",
        "pos",
        "rivals",
        "since",
        "size",
        "urgent",
    )

    def __init__(self, first: int, pos: int, size: int, buffer: bytearray, *, since: float, urgent: bool) -> None:
        self.first = first
        self.pos = pos
        self.size = size  # bytes of the image that it carries, zeros behind the source's end included
        self.buffer = buffer
        self.since = since  # when it left, by trio's clock
        self.arrived = trio.Event()
        self.error: QedfsError | None = None
        self.consumers: list[Consumer] = []  # who will keep the bytes, or are about to; changed by `Budget` only
        self.urgent = urgent  # somebody waited for it when it was started
        self.asked = False  # somebody wanted it before the stream came there
        self.behind = 0  # bytes that were in flight when it left
        self.overdue = False  # a reader has waited for it in vain
        self.rivals: list[trio.CancelScope] = []  # around what readers have asked for beside it
        self.holders = 1

    def arrive(self) -> None:
        """Wake all who wait: `error` is set, or the bytes are there and what was asked for beside it is not needed."""
        self.arrived.set()
        if self.error is None:
            for rival in self.rivals:
                rival.cancel()

    async def arrives(self, latest: float) -> bool:
        """Wait for it until this moment of trio's clock, and say whether it has arrived."""
        if not self.arrived.is_set():
            with trio.move_on_at(latest):
                await self.arrived.wait()
        return self.arrived.is_set()

    async def copy_to(self, pos: int, view: memoryview) -> None:
        """Wait for the bytes, and fill `view` with those at `pos` of the image. Raises the flight's error."""
        await self.arrived.wait()
        if self.error is not None:
            raise self.error.fresh()
        start = pos - self.pos
        view[:] = memoryview(self.buffer)[start : start + len(view)]
