"""Which file system stands at a path, as the kernel's table says. Asks nothing of the file system, which may hang."""

from __future__ import annotations

import os
from typing import NamedTuple

from qedfs.host.procfs import mounts


class MountInfo(NamedTuple):
    """A mounted file system."""

    device: str  # "0:57": no other file system has it for as long as this one lives, mounted or not
    kind: str


def mount_info_at(place: str) -> MountInfo | None:
    """The file system mounted at this path (`place_of`), the topmost if there are several; None if there is none."""
    wanted = os.fsencode(place)
    found = None
    for line in mounts():
        if line.place == wanted:
            found = MountInfo(line.device, line.kind)
    return found
