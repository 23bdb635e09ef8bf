"""The clock of a mount: the time in which its event loop could work. Owns what is left out of it.

Deadlines say how long a source may take to answer, and a process that stands still hears no answer: after SIGSTOP, a
paused virtual machine, or a disk that has held up the loop, all deadlines were over at once, and all readers got EIO
though the answers were there. So such a time counts for STALL_SECONDS and no more. (The time in which Linux itself is
suspended is not in its monotonic clock to begin with.)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

STALL_SECONDS = 1.0  # longer than any turn of the loop, or the wait after it, should take more than it had to
LONGEST_SLEEP_SECONDS = 1.0  # what is longer than the wait is noticed, so waits are short
_BEGINNING = 1e5  # whoever takes the time of another clock for one of this shall notice


class LoopClock(trio.abc.Clock):
    """For `trio.run`. It is asked at the beginning and at the end of each wait, and by everybody in between."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = 0.0  # when it was asked last
        self._asleep = 0.0  # that the loop may sleep from then on
        self._offset = 0.0

    def start_clock(self) -> None:
        """The loop begins."""
        self._last = self._now()
        self._offset = _BEGINNING - self._last

    def current_time(self) -> float:
        """Seconds in which the loop could work."""
        now = self._now()
        stall = now - self._last - self._asleep - STALL_SECONDS
        if stall > 0:
            self._offset -= stall
        self._last, self._asleep = now, 0.0
        return now + self._offset

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """How long the loop may wait now."""
        seconds = min(deadline - self.current_time(), LONGEST_SLEEP_SECONDS)
        self._asleep = max(0.0, seconds)
        return seconds
