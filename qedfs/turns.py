"""When a request of the background may leave: not while readers wait, and no more than link, disk and memory take.

Owns the readers' count, the quiet after them, and the order of those who wait for a turn. Must not know what they ask
for.

Background requests leave while fewer than `Window.bytes` are in flight; while readers wait, and for a moment after,
only one small one at a time. The moment grows back to the full window step by step, so a reader never finds more than a
few small requests ahead of it on the link.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import trio

from qedfs.backlog import Backlog
from qedfs.flight import Taker
from qedfs.window import MIN_REQUEST_BYTES, Window

QUIET_ROUND_TRIPS = 2.0  # after the last reader's answer, before the background comes back


class Turns:
    """The turns at one source."""

    def __init__(self, window: Window, backlog: Backlog) -> None:
        self.readers = 0  # that wait for bytes, or for the first connection
        self._window = window
        self._backlog = backlog
        self._quiet_since = float("-inf")
        self._preferred = 0  # who wait for a turn before the others of the background
        self._changed = trio.Event()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """As long as a reader waits, and for a moment after, the background holds back."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1
            self._quiet_since = trio.current_time()
            self.wake()

    async def turn(self, taker: Taker, size: int, *, preferred: bool) -> None:
        """Wait until a request of `size` bytes may leave for this taker.

        `preferred`: it does not hold back for readers who wait, and what is not preferred holds back for it.
        """
        if not preferred:
            await self._turn(taker, size, self._allowed)
            return
        self._preferred += 1
        try:
            await self._turn(taker, size, lambda: self._window.bytes)
        finally:
            self._preferred -= 1

    def wake(self) -> None:
        """Something has changed in what is in flight: let those who wait look again."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def change(self) -> None:
        """Wait until `wake` is called."""
        await self._changed.wait()

    @property
    def request_bytes(self) -> int:
        """A good size for the next background request: small while readers are about."""
        near = self.readers or trio.current_time() - self._quiet_since < 0.5
        return MIN_REQUEST_BYTES if near else self._window.request_bytes

    async def _turn(self, taker: Taker, size: int, allowed: Callable[[], int]) -> None:
        backlog = self._backlog
        while backlog.in_flight(taker) >= allowed() or backlog.is_behind(taker, size) or not backlog.has_room(size):
            # Not longer: readers may have become quiet meanwhile.
            with trio.move_on_after(max(0.001, self._window.round_trip / 2)):
                await self.change()

    def _allowed(self) -> int:
        """Bytes that may be in flight in the background before another request leaves."""
        if self._preferred:
            return 0
        if self.readers:
            return 1
        quiet = trio.current_time() - self._quiet_since
        trip = self._window.round_trip
        if quiet < QUIET_ROUND_TRIPS * trip:
            return 1
        doublings = min(20.0, quiet / trip - QUIET_ROUND_TRIPS)
        return int(min(self._window.bytes, MIN_REQUEST_BYTES * 2.0**doublings))
