"""Which file system stands at a path, as the kernel's table says. Asks nothing of the file system, which may hang."""

from __future__ import annotations

import re
from typing import NamedTuple

_OCTAL = re.compile(r"\\([0-7]{3})")


class Standing(NamedTuple):
    """A mounted file system."""

    device: str  # "0:57": no other file system has it for as long as this one lives, mounted or not
    kind: str


def standing_at(place: str) -> Standing | None:
    """The file system mounted at this path (`place_of`), the topmost if there are several; None if there is none."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            fields = left.split()
            # Blanks and backslashes are octal there, proc(5).
            if _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), fields[4]) == place:
                found = Standing(fields[2], right.split()[0])
    return found
