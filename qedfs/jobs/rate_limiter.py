"""A rate limiter in bytes per second: a token bucket on trio's clock. Owns only the arithmetic."""

from __future__ import annotations

import math

import trio

BURST_SECONDS = 0.25  # how much unused time can be caught up
# One piece takes at most this long at the limit. A larger piece would be sent at the speed of the link, followed by a
# long silence. During that, a user could not tell whether the stream is still running, or when it will end.
PIECE_SECONDS = 1.0


class RateLimiter:
    """Wait until `due()` is 0, send a piece, and report it to `sent`. `limit` may change at any time; 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._debt = 0.0  # bytes that were sent too early, as of _at
        self._at = trio.current_time()

    def due(self) -> float:
        """Seconds until the next piece is due."""
        self._pay()
        # Ignore a rounding error of less than a byte, whose time may be below the resolution of the clock.
        return self._debt / self.limit if self.limit and self._debt >= 1 else 0.0

    @property
    def piece_bytes(self) -> float:
        """The maximal size of one piece; infinite without a limit."""
        return PIECE_SECONDS * self.limit if self.limit else math.inf

    def sent(self, size: int) -> None:
        """Record that a piece of `size` bytes was sent."""
        self._pay()
        self._debt += size

    def _pay(self) -> None:
        now = trio.current_time()
        if self.limit:
            self._debt = max(-BURST_SECONDS * self.limit, self._debt - (now - self._at) * self.limit)
        else:
            self._debt = 0.0
        self._at = now
