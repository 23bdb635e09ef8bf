"""When the stream should hold off, and why: a time window, a delay after the start, readers, other load of the machine.

Owns the rules and their measurements. The 2010 proposal left open who detects that a machine is idle, since a process
sees its own requests only. The kernel now tells how long tasks of the whole system have waited for I/O or a processor
(pressure stall information, Documentation/accounting/psi.rst), so load from another machine's disk on the same host
counts too. What our own barriers add to that figure is taken off.

The I/O class of our threads (ioprio_set(2)) is left as it is. Streamed data is written into the page cache, and the
kernel's own threads bring it to the disk, in their class. What our threads wait for are barriers; a guest's flush
waits for the same ones, so a barrier in the idle class would hold back the very guests that the class should protect.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import re
from collections.abc import Callable
from pathlib import Path

import trio

from qedfs.errors import UsageError
from qedfs.units import format_seconds, parse_seconds

GRACE_SECONDS = 2.0  # without a read or write before a guest counts as quiet (stargz-snapshotter waits 5 s)
LOOK_SECONDS = 0.5
# Between two looks at what guests do: each costs a sum over all images, and all their jobs ask. Short beside the grace.
GUEST_LOOK_SECONDS = 0.05
STALE_SECONDS = 5.0  # a figure of a longer time says little about now
IO_SHARE = 0.10  # of the time in which some task waited for I/O, beyond which the disk is busy
CPU_SHARE = 0.60  # likewise for a processor; one of two tasks waiting half of the time is common on small machines

_WINDOW = re.compile(r"^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$")


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the user asked for. `between`: minutes of the day (start, end), local time; it may span midnight."""

    quiet: bool = False  # stream only while readers and machine are quiet
    between: tuple[int, int] | None = None
    delay: tuple[float, float] = (0.0, 0.0)  # seconds after the start, a random point of this range


def parse_between(text: str) -> tuple[int, int]:
    """Minutes of the day of "22:00-06:00". Raises UsageError."""
    found = _WINDOW.match(text.strip())
    if found is not None:
        hour, minute, end_hour, end_minute = map(int, found.groups())
        start, end = hour * 60 + minute, end_hour * 60 + end_minute
        if minute < 60 and end_minute < 60 and start < 1440 and end <= 1440 and start != end:
            return start, end
    raise UsageError(f"{text!r} is not a time window; write it like 22:00-06:00")


def parse_delay(text: str) -> tuple[float, float]:
    """Seconds of "30s" or of the range "30s-2m". Raises UsageError."""
    first, dash, last = text.partition("-")
    start = parse_seconds(first)
    end = parse_seconds(last) if dash else start
    if end < start:
        raise UsageError(f"{text!r}: the range ends before it starts")
    return start, end


class Pressure:
    """How much of the time since the last look tasks of this machine had to wait, without our own part."""

    def __init__(self, own_waits: Callable[[], float], *, folder: Path = Path("/proc/pressure")) -> None:
        """`own_waits`: seconds that we have spent in barriers so far."""
        self._own_waits = own_waits
        self._folder = folder
        self._looked_at: float | None = None
        self._totals: dict[str, float] = {}
        self._own = 0.0
        self._busy = ""

    def busy(self) -> str:
        """What the machine is busy with, "" if it is quiet; measured anew at most every LOOK_SECONDS.

        The figures are sums since boot, so the first look tells nothing yet: a stream that went ahead on it could have
        brought in gigabytes before the second one.
        """
        now = trio.current_time()
        seconds = now - self._looked_at if self._looked_at is not None else float("inf")
        if seconds >= LOOK_SECONDS:
            totals, own = {kind: self._total(kind) for kind in ("io", "cpu")}, self._own_waits()
            known = seconds < STALE_SECONDS
            self._busy = self._judge(totals, own, seconds) if known else "looks how busy the machine is"
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
        """Seconds in which some task waited, since boot; 0 where the kernel does not tell."""
        try:
            line = (self._folder / kind).read_text().splitlines()[0]
        except (OSError, IndexError):
            return 0.0
        found = re.search(r"total=(\d+)", line)
        return int(found[1]) / 1e6 if found else 0.0


class Idle:
    """The rules at work for all images of one mount."""

    def __init__(
        self,
        rules: Rules,
        pressure: Pressure,
        activity: Callable[[], int],
        *,
        clock: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """`activity`: any number that changes whenever a guest reads or writes; asked for now and then only."""
        self.rules = rules
        self._pressure = pressure
        self._activity = activity
        self._clock = clock
        self._start = trio.current_time() + random.uniform(*rules.delay)  # noqa: S311 - to spread a fleet
        self._looked_at = float("-inf")
        self._seen = 0
        self._seen_at = float("-inf")

    def reason(self) -> str:
        """Why the stream should hold off now, "" if it may run."""
        left = self._start - trio.current_time()
        if left > 0:
            return f"starts in {format_seconds(left)}"
        if self.rules.between is not None and not self._inside(self.rules.between):
            start = self.rules.between[0]
            return f"outside its hours, until {start // 60:02}:{start % 60:02}"
        if not self.rules.quiet:
            return ""
        # Also measured while a reader is about, so that the figure is fresh when it has gone.
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
