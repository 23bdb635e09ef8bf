"""The scheduler of one source: decides when a background request may be sent.

Owns the count of waiting readers, the quiet period after them, and the order of the tasks that wait for a turn. Must
not know what they request.

Background requests are sent while fewer than `CongestionWindow.bytes` are in flight, and while disk and memory keep up.
While readers wait, and for a quiet period after, only one small request at a time is sent. Then the allowance doubles
with every round trip, up to the full window. So after the first one, no reader of a series finds more than a few small
requests ahead of it on the link.
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

DIVISORS = (1, 2)  # background requests are, in turn, 1/1 and 1/2 of the largest size
# The round trip matters if the link would be idle for that part of the time, at least. What is measured of it includes
# the transfer of a request, and is little else if it is shorter than NEAR_SECONDS.
IDLE_PART = 1 / 16
NEAR_SECONDS = 0.004
RECHECK_SECONDS = 0.1  # a waiting task checks again after this time even if no change was signalled
QUIET_SECONDS = 0.5  # how long readers count as active after the last one got its answer
QUIET_ROUND_TRIPS = 2.0  # the quiet period after the last reader got its answer


class Scheduler:
    """Gives the background requests of one source their turns."""

    def __init__(self, window: CongestionWindow, budget: Budget) -> None:
        self.readers = 0  # readers that wait for bytes, or for the first connection
        self._window = window
        self._budget = budget
        self._quiet_since = float("-inf")
        # Preferred requests that wait, by the consumer whose other requests hold back for them; None: everyone's do.
        self._preferred: Counter[Consumer | None] = Counter()
        self._changed = trio.Event()
        self._divisors = itertools.cycle(DIVISORS)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The context of a reader's wait. During it, and for a quiet period after, the background holds back."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1
            self._quiet_since = trio.current_time()
            self.wake()

    async def turn(self, consumer: Consumer, size: int, *, preferred: bool) -> None:
        """Wait until a request of `size` bytes for this consumer may be sent.

        `preferred`: the request does not hold back for waiting readers, and the other requests hold back for it.
        """
        if preferred:
            await self._turn_preferred(consumer, size)
        else:
            await self._turn(consumer, size)

    def may_send(self, consumer: Consumer, size: int, *, preferred: bool) -> bool:
        """Whether `turn` would return without a wait."""
        return not self._must_wait(consumer, size, self._window.bytes if preferred else self._allowed(consumer))

    def wake(self) -> None:
        """Signal that flights have changed, so that the waiting tasks check again."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def change(self) -> None:
        """Wait for the next call of `wake`."""
        await self._changed.wait()

    def request_bytes(self) -> int:
        """The size for the next background request: small while readers are active.

        Otherwise, if the round trip matters, sizes alternate between twice and once what the window suggests, as far as
        they may. On a fair link, requests of the same size that were sent together also end together. Then the next
        ones are sent together, and the link is idle for a round trip in between. Computed for 1 Gbit/s and 20 to 200
        ms, a stream then has 57 to 75 % of the link's rate with one size, and 98 to 100 % with two. A third size, of a
        half, would add nothing, and a quarter more requests, each of which is work for us. Free buffers are pooled by
        size, too.
        """
        if self._readers_active():
            return MIN_REQUEST_BYTES
        window, size = self._window, self._window.request_bytes
        idle_bytes = window.rate * window.round_trip - size / 2
        if window.round_trip < NEAR_SECONDS or idle_bytes < IDLE_PART * window.bytes:
            return size
        return max(MIN_REQUEST_BYTES, min(MAX_REQUEST_BYTES, 2 * size) // next(self._divisors))

    def gather_seconds(self) -> float:
        """For how long the bytes of background requests may gather before they are received.

        0 while readers are active, because a reader may want bytes that such a request brings.
        """
        return 0.0 if self._readers_active() else self._window.gather_seconds

    def _readers_active(self) -> bool:
        return self.readers > 0 or trio.current_time() - self._quiet_since < QUIET_SECONDS

    async def _turn(self, consumer: Consumer, size: int) -> None:
        while self._must_wait(consumer, size, allowed := self._allowed(consumer)):
            await self._wait_for_change(soon=allowed < self._window.bytes)

    async def _turn_preferred(self, consumer: Consumer, size: int) -> None:
        while self._must_wait(consumer, size, self._window.bytes):
            # If it waits for the link, all others hold back for it. If it waits for its disk, only requests of its own
            # image do, because a disk that hangs must not delay other images.
            whose = None if self._budget.background >= self._window.bytes else consumer
            self._preferred[whose] += 1
            try:
                await self._wait_for_change(soon=True)
            finally:
                self._preferred[whose] -= 1
                if not self._preferred[whose]:
                    del self._preferred[whose]

    def _must_wait(self, consumer: Consumer, size: int, allowed: int) -> bool:
        budget = self._budget
        return (
            budget.in_flight(consumer) >= allowed
            or budget.is_behind(consumer, size, background=True)
            or not budget.has_room(size)
        )

    async def _wait_for_change(self, *, soon: bool) -> None:
        """Wait until flights have changed. `soon`: the passing of time alone may allow the request.

        In that case the recheck comes soon, as the quiet period is short. Otherwise the link or a disk is the cause,
        and may hang: many streams that rechecked every millisecond would take a whole CPU.
        """
        with trio.move_on_after(max(0.001, self._window.round_trip / 2) if soon else RECHECK_SECONDS):
            await self.change()

    def _allowed(self, consumer: Consumer) -> int:
        """How many background bytes may be in flight before another request has to wait."""
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
