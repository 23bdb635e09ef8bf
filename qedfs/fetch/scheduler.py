"""When a request of the background may leave: not while readers wait, and no more than link, disk and memory take.

Owns the readers' count, the quiet after them, and the order of those who wait for a turn. Must not know what they ask
for.

Background requests leave while fewer than `CongestionWindow.bytes` are in flight. While readers wait, and for a moment
after, one small request leaves at a time. Then the allowance doubles with every round trip up to the full window, so a
reader never finds more than a few small requests ahead of it on the link.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator

import trio

from qedfs.fetch.budget import Budget
from qedfs.fetch.congestion import MAX_REQUEST_BYTES, MIN_REQUEST_BYTES, CongestionWindow
from qedfs.fetch.flight import Consumer

PARTS = (1, 2, 4)  # of the largest request, that those of the background are in turn
LOOK_SECONDS = 0.1  # until who waits looks again although it has heard of no change
QUIET_ROUND_TRIPS = 2.0  # after the last reader's answer, before the background comes back


class Scheduler:
    """The turns at one source."""

    def __init__(self, window: CongestionWindow, budget: Budget) -> None:
        self.readers = 0  # that wait for bytes, or for the first connection
        self._window = window
        self._budget = budget
        self._quiet_since = float("-inf")
        # How many wait for a turn before the others of the background: of everybody (None), or of one taker.
        self._preferred: Counter[Consumer | None] = Counter()
        self._changed = trio.Event()
        self._parts = itertools.cycle(PARTS)

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

    async def turn(self, consumer: Consumer, size: int, *, preferred: bool) -> None:
        """Wait until a request of `size` bytes may leave for this taker.

        `preferred`: it does not hold back for readers who wait, and what is not preferred holds back for it.
        """
        if preferred:
            await self._turn_preferred(consumer, size)
        else:
            await self._turn(consumer, size)

    def wake(self) -> None:
        """Something has changed in what is in flight: let those who wait look again."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def change(self) -> None:
        """Wait until `wake` is called."""
        await self._changed.wait()

    def request_bytes(self) -> int:
        """A good size for the next background request: small while readers are about.

        Otherwise, where a round trip counts, twice, once and half of what the window advises. Requests of one size that
        left together end together on a link that shares itself out fairly; the next ones leave together, and the link
        is idle for a round trip in between. A stream over 200 ms and 1 Gbit/s has 108 MB/s with one size, 115 MB/s with
        three. No more than three: free buffers are kept by size.
        """
        if self.readers or trio.current_time() - self._quiet_since < 0.5:
            return MIN_REQUEST_BYTES
        size = self._window.request_bytes
        if self._window.rate * self._window.round_trip < 2 * size:
            return size  # the time of the request is most of its round trip
        return max(MIN_REQUEST_BYTES, min(MAX_REQUEST_BYTES, 2 * size) // next(self._parts))

    async def _turn(self, consumer: Consumer, size: int) -> None:
        while self._must_wait(consumer, size, allowed := self._allowed(consumer)):
            await self._look_again(soon=allowed < self._window.bytes)

    async def _turn_preferred(self, consumer: Consumer, size: int) -> None:
        while self._must_wait(consumer, size, self._window.bytes):
            # While it waits for the link, everybody holds back for it; else its own image, since a disk that hangs must
            # hold up nobody else.
            whom = None if self._budget.background >= self._window.bytes else consumer
            self._preferred[whom] += 1
            try:
                await self._look_again(soon=True)
            finally:
                self._preferred[whom] -= 1
                if not self._preferred[whom]:
                    del self._preferred[whom]

    def _must_wait(self, consumer: Consumer, size: int, allowed: int) -> bool:
        budget = self._budget
        return budget.in_flight(consumer) >= allowed or budget.is_behind(consumer, size) or not budget.has_room(size)

    async def _look_again(self, *, soon: bool) -> None:
        """Wait until something has changed in what is in flight. `soon`: time alone may end what is waited for.

        Then it is not longer than readers may take to become quiet. Else it is the link or a disk, which may hang: many
        streams that looked again every millisecond would take a processor.
        """
        with trio.move_on_after(max(0.001, self._window.round_trip / 2) if soon else LOOK_SECONDS):
            await self.change()

    def _allowed(self, consumer: Consumer) -> int:
        """Bytes that may be in flight in the background before another request leaves."""
        if self._preferred[None] or self._preferred[consumer]:
            return 0
        if self.readers:
            return 1
        quiet = trio.current_time() - self._quiet_since
        trip = self._window.round_trip
        if quiet < QUIET_ROUND_TRIPS * trip:
            return 1
        doublings = min(20.0, quiet / trip - QUIET_ROUND_TRIPS)
        return int(min(self._window.bytes, MIN_REQUEST_BYTES * 2.0**doublings))
