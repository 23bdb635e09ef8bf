"""The set of byte ranges of a request that have arrived.

Owns the two violations "these bytes came twice" and "too many pieces". Must not know the wire format. Servers nearly
always answer in order, so a range that begins where the last one ended costs only one comparison.
"""

from __future__ import annotations

from bisect import bisect_right

from qedfs.source.nbd.protocol import Violation

# A reply in more scattered pieces than this is an attack on our processor time. The worst layout of an honest server,
# which answers a 32 MiB request in 64 KiB clusters in any order, leaves 256 gaps.
MAX_PIECES = 1024


class Coverage:
    """Half-open ranges of byte positions, merged where they touch."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0  # bytes

    def add(self, start: int, end: int) -> None:
        """Record that `start` up to `end` has arrived. Raises Violation if a part of it had arrived before."""
        self.total += end - start
        if self._ends and self._ends[-1] == start:
            self._ends[-1] = end
            return
        at = bisect_right(self._starts, start)
        if (at and self._ends[at - 1] > start) or (at < len(self._starts) and self._starts[at] < end):
            raise Violation("the server sent some bytes of a reply twice")
        if at and self._ends[at - 1] == start:
            self._ends[at - 1] = end
            self._close_gap(at)
        elif at < len(self._starts) and self._starts[at] == end:
            self._starts[at] = start
        elif len(self._starts) >= MAX_PIECES:
            raise Violation(f"the server sent a reply in more than {MAX_PIECES} scattered pieces")
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)

    def _close_gap(self, at: int) -> None:
        if at < len(self._starts) and self._starts[at] == self._ends[at - 1]:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
