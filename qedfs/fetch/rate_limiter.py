"""A rate limiter in bytes per second: a token bucket on trio's clock.

Owns the account of what was sent too early. Must not know what it limits, nor send anything.
"""

from __future__ import annotations

import math

import trio

BURST_SECONDS = 0.25  # how much unused time can be caught up
# One piece takes at most this long at the limit. A larger piece would be sent at the speed of the link, followed by a
# silence, and the rate over the next half minute would differ from the limit by more than a few percent.
PIECE_SECONDS = 0.25
# How far ahead of its limit an image may take what another image has requested. Three pieces: an image that has just
# sent a request of its own can take the piece of another one as well, and again every time. With less it would refuse
# each of those pieces and fetch them again later.
OVERDRAFT_SECONDS = 3 * PIECE_SECONDS
OVERDRAFT_CLUSTERS = 2  # the same, if a cluster takes longer than a piece


class RateLimiter:
    """Wait until `due()` is 0, send a piece, and report it to `sent`."""

    def __init__(self, limit: int = 0) -> None:
        """`limit`: bytes per second, 0 for none."""
        self.granted = 0  # bytes that were reported to `sent`
        self._limit = limit
        self._debt = 0.0  # bytes that were sent too early, as of _at; negative for unused time
        self._at = trio.current_time()
        self._changed = trio.Event()

    @property
    def limit(self) -> int:
        """Bytes per second, 0 for none. May change at any time."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._pay()
        if limit < self._limit and self._debt > 0:
            # What was sent under the old limit takes the time that it would have taken under that.
            self._debt *= limit / self._limit
        self._limit = limit
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def until_due(self) -> None:
        """Wait until `due()` is 0. Follows changes of the limit."""
        while due := self.due():
            with trio.move_on_after(due):
                await self._changed.wait()

    def due(self) -> float:
        """Seconds until the next piece is due."""
        if not self._limit:
            return 0.0
        self._pay()
        # Ignore a rounding error of less than a byte, whose time may be below the resolution of the clock.
        return self._debt / self._limit if self._debt >= 1 else 0.0

    @property
    def piece_bytes(self) -> float:
        """The maximal size of one piece; infinite without a limit."""
        return PIECE_SECONDS * self._limit if self._limit else math.inf

    def overdraft_bytes(self, cluster_size: int) -> float:
        """How many bytes may be taken before they are due, if they were requested anyway; infinite without a limit."""
        if not self._limit:
            return math.inf
        self._pay()
        return max(OVERDRAFT_SECONDS * self._limit, OVERDRAFT_CLUSTERS * cluster_size) - self._debt

    def sent(self, size: int) -> None:
        """Record that a piece of `size` bytes was sent. A negative size corrects what was recorded for a piece."""
        self.granted += size
        if self._limit:
            self._pay()
            self._debt += size

    def _pay(self) -> None:
        now = trio.current_time()
        if self._limit:
            self._debt = max(-BURST_SECONDS * self._limit, self._debt - (now - self._at) * self._limit)
        else:
            self._debt = 0.0
        self._at = now
