"""Which writes of an overlay may run on the event loop, and for how long none may after slow ones.

Owns this decision. Must not know clusters or entries.

A write of FUSE's largest size goes into the page cache in 0.2 ms. If the host has many dirty pages the kernel makes the
writer sleep, which `dirty_pages.py` sees beforehand. While the file system is frozen, every write to it sleeps until
the thaw, which may take minutes. `Storage.would_wait` sees that, but for a freeze that begins in the microsecond after
the look. Other waits show only afterwards: the dirty pages of a control group (MemoryMax=), a file server, a file
system in user space, a page that has to be read first, or one under write-back on a device with checksums. Each such
write stalls every image of the mount. So after one, the writes of this overlay go to threads for REST times as long.
However slow its disk is, one overlay then stalls the others for at most 1 % of the time.

A write that only waits for a processor takes long as well, and in a thread it would take longer. The kernel counts such
waits apart from those in which a task sleeps. Reading that count takes 1 us, so it is read only for the writes that
follow a slow one.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from time import monotonic

from qedfs.overlay.dirty_pages import dirty_pages

# The largest write on the event loop: FUSE's largest. To the page cache, 4 KiB take 1.4 us and 64 KiB some 20 us. A
# thread costs 70 to 190 us, and contends with the event loop for the interpreter's lock.
MOST_BYTES = 1 << 20
SLOW_SECONDS = 0.01
REST = 100
WATCHED = 64  # writes after a slow one of which it is known whether they have slept


class LoopWrites:
    """The writes of one overlay file. Costs a write 2 us.

    `would_wait`: whether a write would have to wait before it begins (`Storage.would_wait`).
    """

    __slots__ = ("_began", "_rest_until", "_sleeps", "_watched", "_would_wait")

    def __init__(self, would_wait: Callable[[], bool]) -> None:
        self._would_wait = would_wait
        self._began = 0.0
        self._rest_until = 0.0
        self._watched = 0  # writes that are still to be watched
        self._sleeps = -1  # how often this thread had slept when the write began; -1 if the write is not watched

    def may_begin(self, size: int) -> bool:
        """Whether a write of `size` bytes may run on the event loop. If so, call `ended` after it, without an await."""
        self._began = now = monotonic()
        if size > MOST_BYTES or now < self._rest_until or dirty_pages.crowded(now) or self._would_wait():
            return False
        if self._watched:
            self._watched -= 1
            self._sleeps = _sleeps()
        return True

    def ended(self) -> None:
        """Note that the write has ended."""
        seconds = monotonic() - self._began
        if seconds >= SLOW_SECONDS:
            self._watched = WATCHED
            if 0 <= self._sleeps < _sleeps():
                self._rest_until = self._began + (1 + REST) * seconds
        self._sleeps = -1


def _sleeps() -> int:
    """How often this thread has waited for something else than a processor."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
