"""The beat of a mount: what recurs once a second recurs at the same moments, so that an idle mount wakes up only then.

Owns the moments. Must not know what is done then.
"""

from __future__ import annotations

import math

import trio


async def next_beat(seconds: float) -> None:
    """Sleep until the clock of the loop is at the next multiple of `seconds`."""
    now = trio.current_time()
    await trio.sleep_until((math.floor(now / seconds) + 1) * seconds)
