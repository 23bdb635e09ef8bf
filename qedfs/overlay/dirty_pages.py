"""Whether a write into the page cache may have to sleep: the host has nearly as many dirty pages as it allows.

Below the middle between the kernel's two thresholds a buffered write returns at once; above, the kernel makes the
writer sleep (balance_dirty_pages). On the event loop that would stall every image of the mount, so then writes go to a
worker thread. The kernel's counters are looked at a few times a second: 60 us a look.
"""

from __future__ import annotations

import os
import time

LOOK_SECONDS = 0.1
MARGIN = 0.8  # of the middle: other writers go on between two looks


class DirtyPages:
    """The host's dirty pages, as of at most LOOK_SECONDS ago."""

    def __init__(self) -> None:
        self._crowded = False
        self._next_look = 0.0
        self._fd = -1

    def crowded(self) -> bool:
        """Whether writes should leave the event loop now."""
        now = time.monotonic()
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
            return False  # a kernel that does not tell
        return held > MARGIN * middle


dirty_pages = DirtyPages()  # of this machine, so one for all overlays
