"""The clock of a mount: it counts only time in which the event loop could run. Owns the rule for leaving out time.

A deadline limits how long a source may take to answer, but a stopped process cannot receive an answer. After SIGSTOP, a
paused virtual machine, or a disk that blocked the loop, all deadlines would have passed at once, and all readers would
get EIO although the answers had arrived. So each such stall counts as at most STALL_SECONDS. (Linux's monotonic clock
already leaves out the time for which the system is suspended.)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

STALL_SECONDS = 1.0  # longer than one iteration of the loop, or the delay of a timer, should ever take
LONGEST_SLEEP_SECONDS = 1.0  # a stall shows only as the excess over a planned sleep, so sleeps are short
_BEGINNING = 1e5  # far from zero and from other clocks, so that mixing up two clocks is noticed


class LoopClock(trio.abc.Clock):
    """For `trio.run`, which reads it before and after each wait; other code reads it in between."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = 0.0  # time of the last reading
        self._asleep = 0.0  # seconds that the loop may sleep after it
        self._offset = 0.0

    def start_clock(self) -> None:
        """Called by trio when the loop starts."""
        self._last = self._now()
        self._offset = _BEGINNING - self._last

    def current_time(self) -> float:
        """Seconds, without stalls."""
        now = self._now()
        stall = now - self._last - self._asleep - STALL_SECONDS
        if stall > 0:
            self._offset -= stall
        self._last, self._asleep = now, 0.0
        return now + self._offset

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """How long the loop may sleep now, in seconds."""
        seconds = min(deadline - self.current_time(), LONGEST_SLEEP_SECONDS)
        self._asleep = max(0.0, seconds)
        return seconds
