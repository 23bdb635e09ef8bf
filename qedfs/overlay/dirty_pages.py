"""Detects whether a write to the page cache may block, because the host has nearly as many dirty pages as it allows.

Owns the estimate, one for all overlays. Must not know overlays, nor what the callers do with it (`loop_writes.py`,
`open_session.py`).

Below the midpoint of the kernel's two thresholds a buffered write returns at once. Above it, the kernel makes the
writer sleep (balance_dirty_pages). On the event loop this would stall every image of the mount, so writes then go to a
worker thread. The kernel's counters are read a few times per second, which takes 60 us.
"""

from __future__ import annotations

import os

LOOK_SECONDS = 0.1
MARGIN = 0.8  # of the midpoint, because other writers continue between two checks


class DirtyPages:
    """The state of the host's dirty pages, at most LOOK_SECONDS old."""

    def __init__(self) -> None:
        self._crowded = False
        self._next_look = 0.0
        self._fd = -1

    def crowded(self, now: float) -> bool:
        """Whether writes should leave the event loop. `now`: time.monotonic()."""
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._crowded = self._look()
        return self._crowded

    def _look(self) -> bool:
        try:
            if self._fd < 0:
                self._fd = os.open("/proc/vmstat", os.O_RDONLY | os.O_CLOEXEC)
            counters = dict(line.split(b" ") for line in os.pread(self._fd, 1 << 16, 0).splitlines())
            held = int(counters[b"nr_dirty"]) + int(counters[b"nr_writeback"])
            middle = (int(counters[b"nr_dirty_threshold"]) + int(counters[b"nr_dirty_background_threshold"])) / 2
        except (OSError, KeyError, ValueError):
            return False  # the kernel does not report it
        return held > MARGIN * middle


dirty_pages = DirtyPages()  # one for all overlays, as it is about the machine
