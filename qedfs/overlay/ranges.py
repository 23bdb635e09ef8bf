"""Ranges of numbers that were marked, joined where they meet: it takes memory for gaps and not for numbers. A leaf."""

from __future__ import annotations

from bisect import bisect_right


class Ranges:
    """Half-open ranges in rising order, none of which touches the next."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def end_of(self, number: int) -> int | None:
        """Where the range ends that holds this number; None: it is not marked."""
        at = bisect_right(self._starts, number) - 1
        return self._ends[at] if at >= 0 and number < self._ends[at] else None

    def next_from(self, number: int, limit: int) -> int:
        """The first number from here on that is marked, or `limit`."""
        if self.end_of(number) is not None:
            return min(number, limit)
        at = bisect_right(self._starts, number)
        return min(self._starts[at], limit) if at < len(self._starts) else limit

    def add(self, start: int, end: int) -> None:
        """Mark the numbers from `start` up to the one before `end`; none of them is marked yet."""
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
