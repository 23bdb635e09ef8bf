"""The reduction of a map to a picture: runs -> cells of equal size, each of one kind.

Pure, and shared by all pictures. What a table says is data, zeros or missing: whether data was written by a guest or
fetched from the backing is not kept anywhere, so no picture can show it.
"""

from __future__ import annotations

import enum

from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import Run


class Kind(enum.IntEnum):
    """What a cell shows."""

    DATA = 0  # all of it is local, and some of it is data
    ZEROS = 1  # all of it reads as zeros and needs no backing
    MISSING = 2
    PART = 3  # some of it is missing, the rest is local


class Cells:
    """Cells of `size` bytes, in the order of the image; the last one may be a part of one."""

    def __init__(self, image_size: int, cluster_size: int, most: int, *, standing_alone: bool) -> None:
        """At most `most` cells; `standing_alone`: there is no backing, so that what is missing reads as zeros.

        A cell is a power of two of clusters, so that its size is a number that people can reckon with.
        """
        self.size = cluster_size
        while self.size * most < image_size:
            self.size *= 2
        self.image_size = image_size
        self.totals = dict.fromkeys((Kind.DATA, Kind.ZEROS, Kind.MISSING), 0)  # bytes of the image
        self._standing_alone = standing_alone
        self._seen = bytearray(-(-image_size // self.size))  # per cell a bit of each kind that it has some of

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, run: Run) -> None:
        """Take one run of the map into account."""
        kind = self._kind(run.offset)
        self.totals[kind] += run.size
        for cell in range(run.pos // self.size, -(-(run.pos + run.size) // self.size)):
            self._seen[cell] |= 1 << kind

    def kinds(self) -> list[Kind]:
        """The kind of each cell."""
        return [_shown(seen) for seen in self._seen]

    def _kind(self, offset: int) -> Kind:
        if offset > ZERO:
            return Kind.DATA
        return Kind.ZEROS if offset == ZERO or self._standing_alone else Kind.MISSING


def _shown(seen: int) -> Kind:
    if seen & 1 << Kind.MISSING:
        return Kind.MISSING if seen == 1 << Kind.MISSING else Kind.PART
    return Kind.DATA if seen & 1 << Kind.DATA else Kind.ZEROS
