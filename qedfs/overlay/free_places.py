"""Free clusters of the overlay file, as runs of neighbours, of which the lowest is used first.

Owns the runs. Must not know why a cluster is free, nor what it contains. A defragmentation leaves a few runs of many
clusters each, random discards many runs of one. The number of runs is bounded, and so is the memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

MOST_RUNS = 1 << 16  # some MiB of memory
LOOKED_AT = 8192  # runs, which takes 1 ms


class FreePlaces:
    """Offsets of free clusters. None is in it twice."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        # Each run from its start to its end, exclusive. By descending start, so that the lowest is taken from the end,
        # and as negative numbers, because bisect wants them ascending.
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        """The number of runs."""
        return len(self._starts)

    def add(self, offsets: Iterable[int]) -> None:
        """Add clusters."""
        size = self._cluster_size
        start = end = -1
        for offset in sorted(offsets):
            if offset == end:
                end += size
                continue
            if end >= 0:
                self._add_run(start, end)
            start, end = offset, offset + size
        if end >= 0:
            self._add_run(start, end)

    def forget_some(self) -> None:
        """Forget the highest runs, if there are more than MOST_RUNS."""
        if (more := len(self) - MOST_RUNS) > 0:
            del self._starts[:more], self._ends[:more]

    def _add_run(self, start: int, end: int) -> None:
        at = bisect_left(self._starts, -start)  # the runs from here on are lower
        if at and -self._starts[at - 1] == end:
            end = self._ends[at - 1]
            at -= 1
            del self._starts[at], self._ends[at]
        if at < len(self) and self._ends[at] == start:
            self._ends[at] = end
        else:
            self._starts.insert(at, -start)
            self._ends.insert(at, end)

    def take(self) -> int | None:
        """Take the lowest cluster; None if there is none."""
        return self.take_row(1, 1 << 64) if self._starts else None

    def take_row(self, count: int, below: int) -> int | None:
        """Take `count` neighbours, the lowest that there are before offset `below`.

        Looks at the lowest LOOKED_AT runs.
        """
        size = count * self._cluster_size
        for at in range(len(self) - 1, max(-1, len(self) - 1 - LOOKED_AT), -1):
            start = -self._starts[at]
            if start + size > below:
                return None
            if start + size <= self._ends[at]:
                self._starts[at] -= size
                if -self._starts[at] == self._ends[at]:
                    del self._starts[at], self._ends[at]
                return start
        return None

    def beginning_at(self, end: int) -> int:
        """Where the run begins that ends at offset `end`; `end` if there is none. Only for the highest run."""
        return -self._starts[0] if self._starts and self._ends[0] == end else end

    def drop_highest(self) -> None:
        """Forget the highest run."""
        del self._starts[0], self._ends[0]
