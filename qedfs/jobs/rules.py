"""The user's rules for when a stream holds off, and how they are written on the command line.

Owns the fields and their spelling. Must not know when a rule holds: `jobs/idle.py` applies them. Pure. Loads no trio: a
command line is checked before anything is served.
"""

from __future__ import annotations

import dataclasses
import re

from qedfs.errors import UsageError
from qedfs.units import parse_seconds

_WINDOW = re.compile(r"^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$")


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """The user's rules. `between`: minutes of the day (start, end), in local time. The window may span midnight."""

    quiet: bool = False  # stream only while guests and machine are idle
    between: tuple[int, int] | None = None
    delay: tuple[float, float] = (0.0, 0.0)  # seconds after the start, picked at random from this range


def parse_between(text: str) -> tuple[int, int]:
    """Parse "22:00-06:00" into minutes of the day. Raises UsageError."""
    found = _WINDOW.match(text.strip())
    if found is not None:
        hour, minute, end_hour, end_minute = map(int, found.groups())
        start, end = hour * 60 + minute, end_hour * 60 + end_minute
        if minute < 60 and end_minute < 60 and start < 1440 and end <= 1440 and start != end:
            return start, end
    raise UsageError(f"{text!r} is not a time window; write it like 22:00-06:00")


def parse_delay(text: str) -> tuple[float, float]:
    """Parse "30s", or the range "30s-2m", into seconds. Raises UsageError."""
    first, dash, last = text.partition("-")
    start = parse_seconds(first)
    end = parse_seconds(last) if dash else start
    if end < start:
        raise UsageError(f"{text!r}: the range ends before it starts")
    return start, end
