"""Bytes per second, evenly: a token bucket on trio's clock. Owns nothing but the arithmetic."""

from __future__ import annotations

import math

import trio

BURST_SECONDS = 0.25  # of unused rate that may be caught up
# Of the rate, that one piece may take: what is larger leaves at the link's speed, with a long silence behind it, in
# which nobody can tell whether the stream goes on, or when it will end.
PIECE_SECONDS = 1.0


class RateLimiter:
    """Wait until `due()` is 0, then tell what was sent. `limit` may be changed at any time; 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._debt = 0.0  # bytes that were sent before they were due, as of _at
        self._at = trio.current_time()

    def due(self) -> float:
        """Seconds until the next piece is due."""
        self._pay()
        # Less than a byte is a matter of rounding: a clock may not even tell the time that it would take.
        return self._debt / self.limit if self.limit and self._debt >= 1 else 0.0

    @property
    def piece_bytes(self) -> float:
        """A good size for one piece at the most; infinite without a limit."""
        return PIECE_SECONDS * self.limit if self.limit else math.inf

    def sent(self, size: int) -> None:
        """A piece of `size` bytes has left."""
        self._pay()
        self._debt += size

    def _pay(self) -> None:
        now = trio.current_time()
        if self.limit:
            self._debt = max(-BURST_SECONDS * self.limit, self._debt - (now - self._at) * self.limit)
        else:
            self._debt = 0.0
        self._at = now
