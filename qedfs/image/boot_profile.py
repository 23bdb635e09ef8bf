"""Which bytes of an image its readers had to wait for, in their order: what the next boot of such an image will want.

A leaf. Owns the list and the file it is kept in: a first line that names the format, then `pos size` in bytes on each
line, and lines of remarks that begin with `#`. It is a hint. A wrong one costs requests, and never a byte of the image.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

from qedfs.errors import UsageError

Range = tuple[int, int]  # pos, size in bytes

FIRST_LINE = "qedfs profile 1"
# The boot of a desktop system reads some thousand pieces. Beyond, the list is left as it is.
MOST_RANGES = 16384
MOST_FILE_BYTES = 1 << 20
_MOST = 1 << 62  # of a position: more than any image has
_LINE = re.compile(r"([0-9]{1,20}) ([0-9]{1,20})", re.ASCII)


class ReadTrace:
    """What readers of one image have waited for since it was opened."""

    def __init__(self) -> None:
        # Of many images together: two numbers take 16 bytes here, and 130 as objects.
        self._starts, self._sizes = array("Q"), array("Q")

    @property
    def ranges(self) -> list[Range]:
        """In their order."""
        return list(zip(self._starts, self._sizes, strict=True))

    def note(self, pos: int, size: int) -> None:
        """A reader waits for these bytes."""
        if self._starts and self._starts[-1] + self._sizes[-1] == pos:
            self._sizes[-1] += size
        elif len(self._starts) < MOST_RANGES:
            self._starts.append(pos)
            self._sizes.append(size)


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
