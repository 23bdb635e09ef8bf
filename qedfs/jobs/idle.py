"""Decides when a stream holds off: a time window, a delay after the start, active readers, other load of the machine.

Owns the measurements for the rules of `jobs/rules.py`. Must not know jobs or images: it is given functions that tell
the guests' activity and the time of our barriers. The 2010 proposal left open who detects that a machine is idle,
because a process only sees its own requests. Today the kernel reports how long tasks of the whole system have waited
for I/O or a CPU (pressure stall information, Documentation/accounting/psi.rst). So the load of other virtual machines
on the same host counts, too. The share of our own barriers is subtracted.

The I/O class of our threads (ioprio_set(2)) is not changed. Streamed data goes into the page cache, and threads of the
kernel write it to the disk, in their own class. Our threads only wait for barriers. A guest's flush waits for the same
barriers, so the idle class would delay the very guests that it should protect.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable
from pathlib import Path

import trio

from qedfs.jobs.rules import Rules
from qedfs.units import format_seconds

GRACE_SECONDS = 2.0  # a guest is quiet after this time without a read or write (stargz-snapshotter waits 5 s)
LOOK_SECONDS = 0.5
# Between two checks of the guests' activity, far below GRACE_SECONDS. A check sums over all images, and all their jobs
# ask for it.
GUEST_LOOK_SECONDS = 0.05
STALE_SECONDS = 5.0  # an average over a longer time says little about the present
IO_SHARE = 0.10  # the disk is busy if some task waited for I/O for more than this share of the time
CPU_SHARE = 0.60  # likewise for a CPU. On small machines, it is normal that one of two tasks waits half of the time.


class Pressure:
    """Measures how much of the time tasks of this machine had to wait, without our own share."""

    def __init__(self, own_waits: Callable[[], float], *, folder: Path = Path("/proc/pressure")) -> None:
        """`own_waits`: returns the seconds that we have spent in barriers so far."""
        self._own_waits = own_waits
        self._folder = folder
        self._looked_at: float | None = None
        self._totals: dict[str, float] = {}
        self._own = 0.0
        self._busy = ""

    def busy(self) -> str:
        """What the machine is busy with, "" if it is idle. Measured at most once per LOOK_SECONDS.

        The kernel's figures are sums since boot, so the first measurement gives no result yet. Until the second one the
        machine counts as busy; otherwise a stream could fetch gigabytes by then.
        """
        now = trio.current_time()
        seconds = now - self._looked_at if self._looked_at is not None else float("inf")
        if seconds >= LOOK_SECONDS:
            totals, own = {kind: self._total(kind) for kind in ("io", "cpu")}, self._own_waits()
            known = seconds < STALE_SECONDS
            self._busy = self._judge(totals, own, seconds) if known else "measuring how busy the machine is"
            self._looked_at, self._totals, self._own = now, totals, own
        return self._busy

    def _judge(self, totals: dict[str, float], own: float, seconds: float) -> str:
        share = {kind: (total - self._totals[kind]) / seconds for kind, total in totals.items()}
        disk = share["io"] - (own - self._own) / seconds
        if disk > IO_SHARE:
            return f"the machine's disk is busy: tasks waited {min(disk, 1):.0%} of the time"
        if share["cpu"] > CPU_SHARE:
            return f"the machine's processors are busy: tasks waited {min(share['cpu'], 1):.0%} of the time"
        return ""

    def _total(self, kind: str) -> float:
        """Seconds since boot in which some task waited; 0 if the kernel does not report it."""
        try:
            line = (self._folder / kind).read_text().splitlines()[0]
        except (OSError, IndexError):
            return 0.0
        found = re.search(r"total=(\d+)", line)
        return int(found[1]) / 1e6 if found else 0.0


class Idle:
    """Applies the rules to the images of one mount."""

    def __init__(
        self,
        rules: Rules,
        pressure: Pressure,
        activity: Callable[[], int],
        *,
        clock: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """`activity`: returns a number that changes whenever a guest reads or writes. Not called often."""
        self.rules = rules
        self._pressure = pressure
        self._activity = activity
        self._clock = clock
        self._start = trio.current_time() + random.uniform(*rules.delay)  # noqa: S311 - to spread a fleet
        self._looked_at = float("-inf")
        self._seen = 0
        self._seen_at = float("-inf")

    def reason(self) -> str:
        """Why streams should hold off now, "" if they may run."""
        left = self._start - trio.current_time()
        if left > 0:
            return f"starts in {format_seconds(left)}"
        if self.rules.between is not None and not self._inside(self.rules.between):
            start = self.rules.between[0]
            return f"outside its hours, until {start // 60:02}:{start % 60:02}"
        if not self.rules.quiet:
            return ""
        # Measure even while a guest is active, so that the result is fresh when it becomes quiet.
        busy = self._pressure.busy()
        return self._reader() or busy

    def _inside(self, window: tuple[int, int]) -> bool:
        now = self._clock()
        minute, (start, end) = now.hour * 60 + now.minute, window
        return start <= minute < end if start < end else minute >= start or minute < end

    def _reader(self) -> str:
        now = trio.current_time()
        if now - self._looked_at >= GUEST_LOOK_SECONDS:
            self._looked_at, activity = now, self._activity()
            if activity != self._seen:
                self._seen, self._seen_at = activity, now
        return "a guest is reading or writing" if now - self._seen_at < GRACE_SECONDS else ""
