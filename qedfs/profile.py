"""Which bytes of an image its readers had to wait for, in their order: what the next boot of such an image will want.

A leaf. Owns the list and the file it is kept in: a first line that names the format, then `pos size` in bytes on each
line, and lines of remarks that begin with `#`. It is a hint. A wrong one costs requests, and never a byte of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qedfs.errors import UsageError

Range = tuple[int, int]  # pos, size in bytes

FIRST_LINE = "qedfs profile 1"
# The boot of a desktop system reads some thousand pieces. Beyond, the list is left as it is.
MOST_RANGES = 16384
MOST_FILE_BYTES = 1 << 20
_MOST = 1 << 62  # of a position: more than any image has
_LINE = re.compile(r"([0-9]{1,20}) ([0-9]{1,20})", re.ASCII)


class Waits:
    """What readers of one image have waited for since it was opened."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def note(self, pos: int, size: int) -> None:
        """A reader waits for these bytes."""
        if self.ranges:
            last_pos, last_size = self.ranges[-1]
            if last_pos + last_size == pos:
                self.ranges[-1] = last_pos, last_size + size
                return
        if len(self.ranges) < MOST_RANGES:
            self.ranges.append((pos, size))


def written(ranges: Iterable[Range], remark: str) -> str:
    """The text of a profile; `remark` is one line for people."""
    lines = (f"{pos} {size}" for pos, size in ranges)
    return "\n".join((FIRST_LINE, f"# {remark}", *lines)) + "\n"


def parsed(text: str, name: str) -> tuple[Range, ...]:
    """The ranges of a profile. Raises UsageError, with `name` and the line, if it is none."""
    lines = text.splitlines()
    if not lines or lines[0] != FIRST_LINE:
        raise UsageError(f"{name}: is not a profile; qedfs profile makes one")
    ranges = []
    for number, line in enumerate(lines[1:], 2):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or not int(found[2]) or int(found[1]) + int(found[2]) > _MOST:
            raise UsageError(f"{name}: line {number} is not a position and a size in bytes")
        ranges.append((int(found[1]), int(found[2])))
    if len(ranges) > MOST_RANGES:
        raise UsageError(f"{name}: has {len(ranges)} ranges, more than {MOST_RANGES}")
    return tuple(ranges)
