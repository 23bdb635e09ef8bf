"""Reduces a map to a picture: runs -> cells of equal size, each of one kind.

Pure, and shared by all pictures. Owns the size of a cell, and its kind if its runs differ. Must not know how a cell is
drawn. A table only tells data, zeros and missing. It does not record whether a guest wrote the data or qedfs fetched
it, so no picture can show that.
"""

from __future__ import annotations

import enum

from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import Run


class Kind(enum.IntEnum):
    """The kind of a cell."""

    DATA = 0  # all of the cell is local, and some of it is data
    ZEROS = 1  # all of it reads as zeros without the backing
    MISSING = 2
    PART = 3  # some of it is missing, the rest is local


class Cells:
    """Cells of `size` bytes, in the order of the image. The last cell may be partly past the end of the image."""

    def __init__(self, image_size: int, cluster_size: int, most: int, *, standing_alone: bool) -> None:
        """Make at most `most` cells. `standing_alone`: there is no backing, so missing clusters read as zeros.

        A cell is a power-of-two number of clusters, so that its size is a round number.
        """
        self.size = cluster_size
        while self.size * most < image_size:
            self.size *= 2
        self.image_size = image_size
        self.totals = dict.fromkeys((Kind.DATA, Kind.ZEROS, Kind.MISSING), 0)  # bytes of the image
        self._standing_alone = standing_alone
        self._seen = bytearray(-(-image_size // self.size))  # per cell, one bit for each kind that occurs in it

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, run: Run) -> None:
        """Add one run of the map."""
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
