"""Boot profiles: the ranges that readers of an image had to wait for, in order, so that a later boot can prefetch them.

Owns the list and its file format: a first line that names the format, then lines of `pos size` in bytes, and comment
lines that start with `#`. Must not know files or sources: `cli/profile_file.py` reads a profile, `jobs/prefetch.py`
fetches its ranges. A profile is a hint: a wrong one costs requests, but never a byte of the image.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

from qedfs.errors import UsageError

Range = tuple[int, int]  # pos, size in bytes

FIRST_LINE = "qedfs profile 1"
# The boot of a desktop system reads some thousand ranges. Further ones are not recorded.
MOST_RANGES = 16384
MOST_FILE_BYTES = 1 << 20
_MOST = 1 << 62  # largest position; no image is that large
_LINE = re.compile(r"([0-9]{1,20}) ([0-9]{1,20})", re.ASCII)


class ReadTrace:
    """The ranges that readers of one image have waited for since it was opened."""

    def __init__(self) -> None:
        # There may be many images: a pair of numbers takes 16 bytes in arrays, and 130 as objects.
        self._starts, self._sizes = array("Q"), array("Q")

    @property
    def ranges(self) -> list[Range]:
        """The ranges in the order of the reads."""
        return list(zip(self._starts, self._sizes, strict=True))

    def note(self, pos: int, size: int) -> None:
        """Record that a reader waits for these bytes."""
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
    """The ranges of a profile. Raises UsageError, with `name` and the line number, if the text is malformed."""
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
