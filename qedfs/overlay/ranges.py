"""A set of integers, stored as ranges: takes memory per gap, not per number.

Pure. Owns their order and merging. Must not know what the numbers mean.
"""

from __future__ import annotations

from bisect import bisect_right


class Ranges:
    """Half-open ranges in ascending order. Adjacent ranges are merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def end_of(self, number: int) -> int | None:
        """The end of the range that contains this number; None if none does."""
        at = bisect_right(self._starts, number) - 1
        return self._ends[at] if at >= 0 and number < self._ends[at] else None

    def next_from(self, number: int, limit: int) -> int:
        """The first number of the set from `number` on, at most `limit`."""
        if self.end_of(number) is not None:
            return min(number, limit)
        at = bisect_right(self._starts, number)
        return min(self._starts[at], limit) if at < len(self._starts) else limit

    def add(self, start: int, end: int) -> None:
        """Add the numbers from `start` to `end`, exclusive. None of them may be in the set yet."""
        if start >= end:
            return
        at = bisect_right(self._starts, start)
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        if at and self._ends[at - 1] == start:
            self._ends[at - 1] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
