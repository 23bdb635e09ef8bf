"""Bytes per second, evenly: a token bucket on trio's clock. Owns nothing but the arithmetic and the sleep."""

from __future__ import annotations

import trio

BURST_SECONDS = 0.25  # of unused rate that may be caught up


class Pace:
    """Call `wait(size)` before each piece. `limit` may be changed at any time; 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._free_at = float("-inf")  # when the pieces let through so far are paid for

    async def wait(self, size: int) -> None:
        """Sleep until a piece of `size` bytes is due."""
        while self.limit and (ahead := self._free_at - trio.current_time()) > 0:  # noqa: ASYNC110 - time passes, there is no event to wait for
            # Short sleeps, so that a new limit takes effect soon.
            await trio.sleep(min(ahead, BURST_SECONDS))
        if self.limit:
            self._free_at = max(self._free_at, trio.current_time() - BURST_SECONDS) + size / self.limit
